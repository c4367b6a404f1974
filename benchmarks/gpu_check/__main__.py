"""`python -m benchmarks.gpu_check`: parts in order of worth, each in a process of its own."""

import argparse
import contextlib
import importlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = 77
_REHEARSED_SECONDS = 300
REHEARSAL = "This is a rehearsal on the CPU: nothing was measured, and nothing is written."


@dataclass(frozen=True)
class Part:
    module: str
    function: str
    seconds: int
    """What it may take; what earlier parts left over comes on top."""
    what: str
    only_rehearsed: bool = False


PARTS = {
    "numbers": Part("numbers", "main", 150, "every kernel and chain against its definition in fp32"),
    "pvm": Part("decoding", "pvm_8b", 80, "Qwen3-VL-8B with PVM: a decoding step, four ways"),
    "mixin": Part("decoding", "mixin_2b", 80, "CoMemo-2B: a decoding step, four ways"),
    "bandwidth": Part("bandwidth", "main", 120, "bandwidth of the decoding kernels, and tuning them"),
    "generate": Part("generating", "main", 130, "transformers' generate, end to end"),
    "engines": Part("engines", "main", 30, "engines built without a GPU; ONNX Runtime on CUDA"),
    "ahead": Part("ahead", "main", 100, "kernels compiled ahead of time", only_rehearsed=True),
}
"""By worth: what does not fit into the time is the last of them."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), help="these alone; by default all")
    parser.add_argument(
        "--spare", type=int, default=0, metavar="SECONDS", help="for the parts beside what each may take"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="where figures are written")
    parser.add_argument("--dry", action="store_true", help="rehearse on the CPU: small sizes, no figures")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.part:
        return run_part(options.part, options.dry, options.out)
    if not options.dry and (reason := why_not()):
        print(f"gpu-check cannot run here: {reason}; `make gpu-check DRY=1` rehearses it on the CPU", file=sys.stderr)
        return 2
    names = options.parts or [name for name, part in PARTS.items() if options.dry or not part.only_rehearsed]
    return run_all(names, options.dry, options.out, spare=options.spare)


def why_not() -> str | None:
    """What is missing for any part at all."""
    absent = [name for name in ("torch", "triton", "transformers") if importlib.util.find_spec(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed"
    import torch

    return None if torch.cuda.is_available() else f"torch {torch.__version__} finds no CUDA device"


def part_command(name: str, dry: bool, out: Path) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu_check", "--part", name, "--out", str(out), *["--dry"] * dry]


def run_all(
    names: Sequence[str],
    dry: bool,
    out: Path,
    command: Callable[[str, bool, Path], list[str]] = part_command,
    spare: float = 0.0,
) -> int:
    """Each part in a process of its own: a fault on the GPU ends all that its process does there, and no more -> the
    exit code, 1 where a part failed. Another `command` runs something else in its place. `spare`: seconds that are
    there beside what each part may take."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"TRITON_INTERPRET": "1"} if dry else {}
    ended: dict[str, str] = {}
    start, allowed = time.monotonic(), spare
    for name in names:
        part = PARTS[name]
        allowed += _REHEARSED_SECONDS if dry else part.seconds
        print(f"\n== {name}: {part.what}", flush=True)
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="surgeon-gpu-check-") as folder:  # also for what a killed part leaves
            child = subprocess.Popen(
                command(name, dry, out), cwd=ROOT, env={**environment, "TMPDIR": folder}, start_new_session=True
            )
            try:
                code = child.wait(timeout=max(1.0, start + allowed - began))
                ended[name] = {0: "done", SKIPPED: "skipped"}.get(code, f"FAILED with exit code {code}")
            except subprocess.TimeoutExpired:
                ended[name] = "FAILED: out of time; what it had is written"
            finally:
                end_group(child)
        ended[name] += f", {time.monotonic() - began:.0f} s"
    print()
    for name, how in ended.items():
        print(f"{name}: {how}")
    if dry:
        print(REHEARSAL)
    return int(any("FAILED" in how for how in ended.values()))


def end_group(child: subprocess.Popen) -> None:
    """End a part and the processes that it started, which have a session of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def run_part(name: str, dry: bool, out: Path) -> int:
    """In the part's own process -> its exit code. A failure is printed whole."""
    from benchmarks.gpu_check.part import PartReport, Setting, Skipped
    from benchmarks.gpu_check.timing import describe_gpu, measure_ceilings, timer

    part, setting = PARTS[name], Setting(dry, out)
    if dry:
        rehearse_without_a_gpu(name)
    clock = timer(setting)
    report = PartReport(name, setting, describe_gpu(setting), measure_ceilings(clock, setting))
    try:
        getattr(importlib.import_module(f"benchmarks.gpu_check.{part.module}"), part.function)(setting, clock, report)
    except Skipped as reason:
        print(f"  SKIPPED: {reason}")
        report.note("skipped", str(reason))
        return SKIPPED
    except Exception as error:  # whatever it is, it is the part's result
        traceback.print_exc()
        report.note("failed", "".join(traceback.format_exception(error)))
        return 1
    report.save(complete=True)
    return 0


def rehearse_without_a_gpu(name: str) -> None:
    """Kernels run interpreted where they would on CUDA, and the packages that a bare machine lacks are not there."""
    from exporters.kernels.cuda import mixin, pvm

    for module, operators in (
        (pvm, ((pvm.persistent_visual_memory, pvm.fused), (pvm.pvm_memory, pvm.fused_memory))),
        (mixin, ((mixin.mixin, mixin.fused), (mixin.mixin_memory, mixin.fused_memory))),
    ):
        module.FORM.devices = ("cuda", "cpu")
        for operator, kernels in operators:
            operator.register_kernel("cpu")(kernels)
    if name in ("numbers", "pvm", "mixin", "bandwidth", "generate"):
        sys.modules["pydantic"] = None  # type: ignore[assignment]


if __name__ == "__main__":
    sys.exit(main())
