"""The native library of the custom operators: compiled once by this machine's C compiler, kept, and offered tables."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import threading
from functools import cache
from pathlib import Path

import onnxruntime as ort

from exporters.kernels.folder import VARIABLE, folder
from exporters.onnxruntime.custom_ops.tables import Table
from surgeon.checkpoint import staged_file
from surgeon.errors import SurgeonError, TargetError

_SOURCE = Path(__file__).with_name("library.c")
_FLAGS = ("-std=c11", "-O2", "-shared", "-fPIC")
_LIBRARIES = ("-ldl", "-lpthread")
_SECONDS = 60
_lock = threading.Lock()
"""Between offering a table and its being registered."""


class CompilerError(SurgeonError):
    """The library cannot be built here: no C compiler, one that fails, or no folder to keep and load the result."""


@cache
def build() -> Path:
    """The compiled library, kept with the kernels; it loads. Raises CompilerError."""
    compiler = _compiler()
    content = "\n".join([_SOURCE.read_text(encoding="utf-8"), *compiler, *_FLAGS, platform.machine()])
    path = folder() / f"onnxruntime-{hashlib.sha256(content.encode()).hexdigest()[:16]}.so"
    try:
        if not _loads(path):  # missing, damaged, or built on another machine, whose C library is newer
            _compile(compiler, path)
            ctypes.CDLL(str(path))
    except (OSError, TargetError) as error:
        raise CompilerError(
            f"the library of custom operators cannot be kept or loaded: {error}; ${VARIABLE} says where"
        ) from error
    return path


def _loads(path: Path) -> bool:
    try:
        ctypes.CDLL(str(path))
    except OSError:
        return False
    return True


def _compile(compiler: list[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(path, overwrite=True) as library:
        command = [*compiler, *_FLAGS, "-o", str(library), str(_SOURCE), *_LIBRARIES]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CompilerError(f"the C compiler {shlex.join(compiler)} does not run: {error}") from error
        if done.returncode:
            reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:300])
            raise CompilerError(f"the C compiler {shlex.join(compiler)} fails: {reason}")


def register(options: ort.SessionOptions, table: Table) -> None:
    """Register a table's operators for the sessions created with these options. Raises CompilerError."""
    path = str(build())
    with _lock:
        ctypes.CDLL(path).surgeon_offer(ctypes.byref(table))
        options.register_custom_ops_library(path)


def _compiler() -> list[str]:
    """$CC, or the first of the usual names that is there."""
    if command := os.environ.get("CC"):
        return shlex.split(command)
    for name in ("cc", "gcc", "clang"):
        if executable := shutil.which(name):
            return [executable]
    raise CompilerError("there is no C compiler (install gcc or clang, or set CC)")
