"""The process in which Triton compiles ahead of time: LLVM may end it, and kernels must not be interpreted in it.

A script, run by its path. Its stdout is JSON, one event a line.
"""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

_SHOWN = 300


def main(argument: str) -> int:
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    request = json.loads(Path(argument).read_text())
    sys.path[:0] = request["paths"]
    # PTX would name this machine's folders, and be several times as large
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    for number, job in enumerate(request["jobs"]):
        try:
            event = {"event": "compiled", "number": number, **compile_kernel(job)}
        except Exception as error:  # whatever Triton, its LLVM or ptxas raise is reported; the parent names the kernel
            event = {"event": "failed", "number": number, "reason": f"{type(error).__name__}: {error}"[:_SHOWN]}
        events.write(json.dumps(event) + "\n")
    return 0


def compile_kernel(job: dict[str, Any]) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(job["module"]), job["function"])
    if list(job["signature"]) != function.arg_names:
        raise TypeError(f"it takes {', '.join(function.arg_names)}, not {', '.join(job['signature'])}")
    attributes = {(place,): [["tt.divisibility", 16]] for place in job["aligned"]}
    source = ASTSource(fn=function, signature=job["signature"], constexprs=job["constants"], attrs=attributes)
    options = {name: job[name] for name in ("num_warps", "num_stages", "ptx_version")}
    compiled = triton.compile(source, target=GPUTarget("cuda", job["capability"], 32), options=options)
    about = compiled.metadata
    return {
        "entry": about.name,
        "ptx": compiled.asm["ptx"],
        "shared": about.shared,
        "num_warps": about.num_warps,
        "scratch": about.global_scratch_size + (getattr(about, "profile_scratch_size", 0) or 0),
    }


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
