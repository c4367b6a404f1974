"""The checks of `surgeon doctor`, one process each: what a library does when it is imported and really used.

`run_check` prints results as lines of JSON behind `MARK`. torch and the backends are imported by the check alone.
"""

import ctypes
import importlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from surgeon.cleanup import temporary_directory

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
MARK = "surgeon-doctor "
"""Starts the lines of a check's stdout that are its results: libraries print there too."""
BEGUN = "begun"
_BROKEN = (ImportError, OSError, RuntimeError, AttributeError, ValueError)
"""What importing or first using a library raises where it, or something under it, is broken or of another version."""


def installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


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
        if installed_version(distribution) is None:
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
        from surgeon.checkpoint.share import share_file  # imports torch, which may be what is broken
    except _BROKEN as error:
        return {"problem": f"links were not tried, because torch cannot be imported: {_first_line(error)}"}
    try:
        with temporary_directory(".surgeon-doctor-", directory) as folder:
            file = folder / "file"
            file.write_bytes(bytes(4096))
            reflink = share_file(file, folder / "reflink", "auto").method == "reflink"
            try:
                os.link(file, folder / "hardlink")
            except OSError:
                return {"reflink": reflink, "hardlink": False}
            return {"reflink": reflink, "hardlink": True}
    except OSError as error:
        return {"problem": f"{directory} cannot be written to: {error.strerror or error}"}


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
        remedy = "pip uninstall onnxruntime, then pip install onnxruntime-gpu"
        return _no("this build of onnxruntime does not have it", remedy)
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "check", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=[provider])
    if session.get_providers()[0] != provider:
        return _no(
            "no session can be created",
            "it needs an NVIDIA GPU with its driver, CUDA and cuDNN: pip install 'onnxruntime-gpu[cuda,cudnn]'",
        )
    (y,) = session.run(None, {"x": np.ones(2, np.float32)})
    return {"works": bool((y == 2).all()), "detail": f"onnxruntime {ort.__version__} runs a graph on it"}


def _ort_cpu() -> dict[str, Any]:
    return _onnxruntime("CPUExecutionProvider")


def _ort_cuda() -> dict[str, Any]:
    importlib.import_module("torch")  # brings its CUDA libraries, as it does where a bundle is run
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
