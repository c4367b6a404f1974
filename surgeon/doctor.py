"""What is installed, which backends work on this machine, and why the others do not.

Every check runs in a process of its own: a broken library may do anything, end the process included.
"""

import ctypes
import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PACKAGES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "transformers": "transformers",
    "safetensors": "safetensors",
    "onnx": "onnx",
    "onnx-ir": "onnx_ir",
    "onnxscript": "onnxscript",
    "onnxruntime": "onnxruntime",
    "onnxruntime-gpu": "onnxruntime",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx",
    "triton": "triton",
    "accelerate": "accelerate",
    "peft": "peft",
}
"""Distribution -> the module it is imported as."""
TIMEOUT = 120.0
MARK = "surgeon-doctor "
"""Starts the lines of a check's stdout that are its results: libraries print there too."""
BEGUN = "begun"
_BROKEN = (ImportError, OSError, RuntimeError, AttributeError, ValueError)
"""What importing or first using a library raises where it, or something under it, is broken or of another version."""


@dataclass(frozen=True)
class Package:
    """`version` is None where it is not installed; `problem` says why it cannot be imported though it is."""

    name: str
    version: str | None
    problem: str | None = None


@dataclass(frozen=True)
class Backend:
    """`detail`: on what it runs, or why it does not. `remedy`: what to install or do, where something helps."""

    name: str
    works: bool
    detail: str
    remedy: str | None = None


@dataclass(frozen=True)
class Storage:
    """What a directory's file system can do for shared weights; None where `problem` kept it from being tried."""

    directory: str
    free_bytes: int | None
    reflink: bool | None
    hardlink: bool | None
    problem: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    packages: list[Package]
    backends: list[Backend]
    storage: Storage

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def diagnose(directory: Path) -> Diagnosis:
    """Look at this Python, at every backend, and at the file system of `directory`. Raises nothing of what it finds."""
    with ThreadPoolExecutor(len(BACKENDS) + 2) as pool:
        imports = pool.submit(_run, "imports")
        storage = pool.submit(_storage, directory)
        backends = [pool.submit(_run, name) for name in BACKENDS]
        return Diagnosis(
            _packages(imports.result()),
            [_backend(name, outcome.result()) for name, outcome in zip(BACKENDS, backends, strict=True)],
            storage.result(),
        )


@dataclass(frozen=True)
class _Outcome:
    """What a check printed. `died`: why its process ended before it was done; `last`: the result begun last."""

    results: dict[str, Any]
    last: str | None
    died: str | None
    stderr: str


def _run(check: str, *arguments: str) -> _Outcome:
    """Run one check in a process of its own, which prints each result as one line of JSON."""
    # Not `-m`: that would put the working directory, and whatever modules lie there, in front of the libraries.
    code = "import sys; sys.path.append(sys.argv[1]); from surgeon.doctor import run_check; run_check(*sys.argv[2:])"
    command = [sys.executable, "-P", "-c", code, str(Path(__file__).resolve().parents[1]), check, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return _Outcome({}, None, f"gave no answer in {TIMEOUT:.0f} seconds", "")
    results: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            results |= json.loads(line.removeprefix(MARK))
    return _Outcome(results, next(reversed(results), None), _cause_of_death(done.returncode, done.stderr), done.stderr)


def _cause_of_death(code: int, stderr: str) -> str | None:
    if code == 0:
        return None
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    lines = stderr.strip().splitlines()
    return f"the process ended {how}" + (f": {lines[-1].strip()[:300]}" if lines else "")


def _packages(imports: _Outcome) -> list[Package]:
    found = [Package("python", platform.python_version())]
    for name, module in PACKAGES.items():
        problem = imports.results.get(module)
        if problem == BEGUN:
            problem = imports.died
        found.append(Package(name, _version(name), problem if _version(name) else None))
    return found


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _backend(name: str, outcome: _Outcome) -> Backend:
    if "works" not in outcome.results:
        return Backend(name, False, outcome.died or "the check printed nothing")
    works, detail, remedy = (outcome.results.get(key) for key in ("works", "detail", "remedy"))
    # ONNX Runtime falls back to another provider in silence: only its log, on stderr, has the reason.
    reason = re.search(r"with error: (.*)|(CUDA failure .*?)(?: ;|$)|(Require cuDNN .*)", outcome.stderr, re.MULTILINE)
    if not works and reason is not None:
        detail = f"{detail}: {next(filter(None, reason.groups())).strip()[:300]}"
    return Backend(name, bool(works), str(detail), remedy)


def _storage(directory: Path) -> Storage:
    place = str(directory.resolve())
    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        return Storage(place, None, None, None, f"{place}: {error.strerror or error}")
    outcome = _run("storage", place)
    problem = outcome.results.get("problem") or outcome.died
    return Storage(place, free, outcome.results.get("reflink"), outcome.results.get("hardlink"), problem)


# -- checks, each in its own process ---------------------------------------------------------------------------
def run_check(check: str, *arguments: str) -> None:
    """Run one check and print what it found."""
    if check == "imports":
        _imports()
    elif check == "storage":
        _emit(_try_storage(Path(*arguments)))
    else:
        function, install = BACKENDS[check]
        try:
            _emit(function())
        except ModuleNotFoundError as error:
            _emit(_no(f"{error.name} is not installed", install))
        except _BROKEN as error:
            _emit(_no(f"{type(error).__name__}: {_first_line(error)}"))


def _emit(results: dict[str, Any]) -> None:
    print(f"\n{MARK}{json.dumps(results)}", flush=True)


def _imports() -> None:
    for distribution, module in PACKAGES.items():
        if _version(distribution) is None:
            continue
        _emit({module: BEGUN})
        try:
            importlib.import_module(module)
            _emit({module: None})
        except _BROKEN as error:
            _emit({module: f"installed, but cannot be imported: {type(error).__name__}: {_first_line(error)}"})


def _try_storage(directory: Path) -> dict[str, Any]:
    """Share a file in `directory` each way, and leave nothing there."""
    try:
        with tempfile.TemporaryDirectory(prefix=".surgeon-doctor-", dir=directory) as name:
            file = Path(name, "file")
            file.write_bytes(bytes(4096))
            from surgeon.checkpoint.share import share_file  # imports torch, which may be what is broken

            reflink = share_file(file, Path(name, "reflink"), "auto").method == "reflink"
            try:
                os.link(file, Path(name, "hardlink"))
            except OSError:
                return {"reflink": reflink, "hardlink": False}
            return {"reflink": reflink, "hardlink": True}
    except OSError as error:
        return {"problem": f"{directory} cannot be written to: {error.strerror or error}"}
    except ImportError as error:
        return {"problem": f"not tried, because torch cannot be imported: {_first_line(error)}"}


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _no(detail: str, remedy: str | None = None) -> dict[str, Any]:
    return {"works": False, "detail": detail, "remedy": remedy}


def _onnxruntime(provider: str) -> dict[str, Any]:
    """Make a session on one provider alone and run it."""
    import numpy as np
    import onnxruntime as ort
    from onnx import TensorProto, helper

    if provider not in ort.get_available_providers():
        return _no("this build of onnxruntime does not have it", "pip uninstall onnxruntime, then pip install onnxruntime-gpu")
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "check", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=[provider])
    if session.get_providers()[0] != provider:
        return _no(
            "no session can be made",
            "it needs an NVIDIA GPU with its driver, CUDA and cuDNN: pip install 'onnxruntime-gpu[cuda,cudnn]'",
        )
    (y,) = session.run(None, {"x": np.ones(2, np.float32)})
    return {"works": bool((y == 2).all()), "detail": f"onnxruntime {ort.__version__} runs a graph on it"}


def _ort_cpu() -> dict[str, Any]:
    return _onnxruntime("CPUExecutionProvider")


def _ort_cuda() -> dict[str, Any]:
    import onnxruntime as ort

    ort.preload_dlls()  # the CUDA libraries that came with torch or as wheels
    return _onnxruntime("CUDAExecutionProvider")


def _torch_cuda() -> dict[str, Any]:
    import torch

    if not torch.backends.cuda.is_built():
        return _no(f"torch {torch.__version__} is built without CUDA", "install a CUDA build of torch: see pytorch.org")
    if not torch.cuda.is_available():
        return _no("torch finds no usable NVIDIA GPU", "look at what nvidia-smi says")
    torch.ones(2, device="cuda").add(1).sum().item()
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return {"works": True, "detail": f"CUDA {torch.version.cuda} on {names}"}


def _tensorrt(module: str) -> dict[str, Any]:
    """Build a one-layer engine for the GPU here and load it; without a GPU, say what is left."""
    trt = importlib.import_module(module)
    if not _has_driver():
        return _no(f"version {trt.__version__} is installed, but there is no NVIDIA driver to run an engine on")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network()
    x = network.add_input("x", trt.float32, (2,))
    network.mark_output(network.add_unary(x, trt.UnaryOperation.NEG).get_output(0))
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan) if plan is not None else None
    if engine is None:
        return _no(f"version {trt.__version__} does not build and load an engine here", "look at what nvidia-smi says")
    return {"works": True, "detail": f"version {trt.__version__} builds and loads an engine"}


def _tensorrt_enterprise() -> dict[str, Any]:
    return _tensorrt("tensorrt")


def _tensorrt_rtx() -> dict[str, Any]:
    return _tensorrt("tensorrt_rtx")


def _triton() -> dict[str, Any]:
    """Compile and launch nothing: ask Triton which GPU it would launch on, and for its C compiler."""
    import triton
    from triton.runtime import driver

    try:
        target = driver.active.get_current_target()
    except RuntimeError as error:
        return _no(
            f"version {triton.__version__} compiles, but cannot launch a kernel here: {_first_line(error)}",
            "kernels run on the CPU under TRITON_INTERPRET=1",
        )
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        return _no(f"version {triton.__version__} finds no C compiler for its launchers", "install gcc")
    return {"works": True, "detail": f"version {triton.__version__} launches for {target.backend} {target.arch}"}


BACKENDS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "ONNX Runtime CPU": (_ort_cpu, "pip install onnxruntime-gpu (it holds the CPU provider too)"),
    "ONNX Runtime CUDA": (_ort_cuda, "pip install onnxruntime-gpu"),
    "torch CUDA": (_torch_cuda, "pip install torch"),
    "TensorRT": (_tensorrt_enterprise, "pip install tensorrt"),
    "TensorRT-RTX": (_tensorrt_rtx, "pip install tensorrt-rtx"),
    "Triton": (_triton, "pip install triton"),
}
"""Backend -> its check, and what installs it."""


def _has_driver() -> bool:
    try:
        return int(ctypes.CDLL("libcuda.so.1").cuInit(0)) == 0
    except OSError:
        return False
