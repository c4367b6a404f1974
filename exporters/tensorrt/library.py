"""The two libraries behind one interface: TensorRT and TensorRT for RTX have the same Python API.

Neither is imported into this process, which a broken library could end: a child says what is there.
"""

import ctypes
import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from exporters.child_process import ProcessError, log_tail, run_child
from exporters.tensorrt.errors import EngineError
from surgeon.cleanup import temporary_directory

Backend = Literal["tensorrt", "tensorrt-rtx"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
NATIVE = "native"
CHILD = Path(__file__).with_name("child.py")
"""The script in which a library works."""


@dataclass(frozen=True)
class Library:
    """A library that is installed, and what it can do."""

    backend: Backend
    version: str
    targets: tuple[str, ...]
    """Compute capabilities that can be named, such as "sm89"; none where it builds for the GPU it finds."""

    @property
    def module(self) -> str:
        return module_of(self.backend)

    @property
    def keeps_timings(self) -> bool:
        """Whether a timing cache does anything: TensorRT for RTX times nothing when it builds."""
        return self.backend == "tensorrt"


def find(backend: Backend) -> Library:
    """The library of a backend. Raises EngineError where it is not installed, or does not work."""
    if importlib.util.find_spec(module_of(backend)) is None:
        near_miss = (
            "; NVIDIA's own package index has its libraries, and pip must be able to reach it: where it cannot, take "
            "--backend tensorrt-rtx"
            if backend == "tensorrt"
            else ""
        )
        raise EngineError(
            f"{backend} is not installed: pip install 'lvlm-surgeon[{backend}]'{near_miss}. Without it, "
            "`surgeon engine --dry-run` plans the engines, and `surgeon generate` and `surgeon validate` run bundles "
            "with ONNX Runtime"
        )
    return _probe(backend)


@cache
def _probe(backend: Backend) -> Library:
    with temporary_directory("surgeon-probe-") as folder:
        log = folder / "log"
        try:
            probed = run_child(["probe", module_of(backend)], f"importing {backend}", log, CHILD).last("probed")
        except ProcessError as error:
            raise EngineError(f"{backend} is installed and does not work: {error}; try `surgeon doctor`") from error
        if probed is None:
            raise EngineError(f"{backend} is installed and does not work: {log_tail(log)}; try `surgeon doctor`")
    return Library(backend, probed["version"], tuple(probed["targets"]))


def installed_version(backend: Backend) -> str | None:
    """The version of a backend's library; None where there is none. It is not loaded."""
    if importlib.util.find_spec(module_of(backend)) is None:
        return None
    try:
        return importlib.metadata.version(backend)
    except importlib.metadata.PackageNotFoundError:
        return None


def module_of(backend: Backend) -> str:
    return backend.replace("-", "_")


def link_libraries(backend: Backend, folder: Path) -> Path:
    """Fill `folder` with links to the library's files under names without a version: the ONNX parser opens the library
    by that name where it meets a plugin, and ends the process where it does not find it. -> the folder."""
    folder.mkdir()
    spec = importlib.util.find_spec(f"{module_of(backend)}_libs")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(place).glob("*.so.*")):
            link = folder / re.sub(r"\.so\..*$", ".so", path.name)
            if not link.exists():
                link.symlink_to(path)
    return folder


def choose_targets(library: Library, target: str) -> tuple[str, ...]:
    """`target`, such as "sm80,sm89" or "native" -> compute capabilities to name; none where the library has no name for
    the GPU that is here.

    Raises EngineError for one that the library does not know, and for `native` without a GPU.
    """
    names = [name.strip().lower() for name in target.split(",") if name.strip()]
    if NATIVE in names:
        if len(names) > 1:
            raise EngineError(f"--target {target}: native stands alone, for the GPU that is here")
        here = gpu()
        if here is None:
            supported = ", ".join(library.targets)
            hint = f"name the GPU to build for instead: {supported}" if supported else "build where the GPU is"
            raise EngineError(f"--target native: there is no GPU here that CUDA can use; {hint}")
        return (here.capability,) if here.capability in library.targets else ()
    if not library.targets:
        raise EngineError(
            f"--target {target}: {library.backend} builds for the GPU that it finds; use --target native where that "
            "GPU is, or --backend tensorrt-rtx, which takes targets by name"
        )
    for name in names:
        if name not in library.targets:
            raise EngineError(
                f"unknown target {name!r}; {library.backend} {library.version} builds for "
                f"{', '.join(library.targets)}, or native"
            )
    if not names:
        raise EngineError(f"--target needs one of {', '.join(library.targets)}, or native")
    return tuple(dict.fromkeys(names))


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: str
    """As targets are named: "sm90"."""


@cache
def gpu() -> Gpu | None:
    """The first GPU that CUDA's driver has; None where there is no driver or no GPU."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, numbers, name = ctypes.c_int(), (ctypes.c_int(), ctypes.c_int()), ctypes.create_string_buffer(256)
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0) or cuda.cuDeviceGetName(name, len(name), device):
        return None
    for number, attribute in zip(numbers, (75, 76), strict=True):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, MINOR
        if cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device):
            return None
    major, minor = (number.value for number in numbers)
    return Gpu(name.value.decode(errors="replace"), f"sm{major}{minor}")
