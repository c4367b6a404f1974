"""The native library: compiled once and kept; where it cannot be compiled, a plain message."""

import ctypes
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

from exporters.kernels.folder import VARIABLE
from exporters.onnxruntime.custom_ops import native
from exporters.onnxruntime.custom_ops.tables import Table


@pytest.fixture(autouse=True)
def again() -> Iterator[None]:
    native.build.cache_clear()
    yield
    native.build.cache_clear()


def test_it_is_compiled_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    first = native.build()
    assert first.parent == tmp_path and first.is_file()
    native.build.cache_clear()

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(subprocess, "run", refuse)
    assert native.build() == first


def test_one_that_does_not_load_is_compiled_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    sound = native.build()
    native.build.cache_clear()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "elsewhere"))
    other = tmp_path / "elsewhere" / sound.name
    other.parent.mkdir()
    other.write_bytes(b"of another machine")
    assert native.build() == other and other.read_bytes() == sound.read_bytes()


def test_a_folder_that_cannot_be_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file" / "kernels"))
    with pytest.raises(native.CompilerError, match=r"cannot be kept or loaded: .*Not a directory.*SURGEON_KERNELS_DIR"):
        native.build()


def test_its_source_has_no_warnings(tmp_path: Path) -> None:
    source = str(native._SOURCE)
    flags = ["-Wall", "-Wextra", "-Werror", "-o", str(tmp_path / "library.so")]
    done = subprocess.run(
        [*native._compiler(), *native._FLAGS, *flags, source], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("/nowhere/cc", "the C compiler /nowhere/cc does not run: .*No such file"),
        ("cc -DOperator=1", "the C compiler cc -DOperator=1 fails: .*error"),
    ],
)
def test_a_compiler_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, compiler: str, message: str) -> None:
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(native.CompilerError, match=message):
        native.build()


def test_a_machine_without_a_compiler_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(native.CompilerError, match="there is no C compiler"):
        native.build()


def test_nothing_is_registered_without_a_table() -> None:
    with pytest.raises(Exception, match="surgeon's library of kernels is loaded by surgeon alone"):
        ort.SessionOptions().register_custom_ops_library(str(native.build()))


def test_no_table_is_offered_between_another_and_its_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library registers the table that was offered last."""
    calls: list[str] = []

    class Library:
        def __init__(self, path: str) -> None: ...

        def surgeon_offer(self, table: Any) -> None:
            calls.append(threading.current_thread().name)
            time.sleep(0.05)

    class Options:
        def register_custom_ops_library(self, path: str) -> None:
            calls.append(threading.current_thread().name)

    monkeypatch.setattr(native, "build", lambda: "library.so")
    monkeypatch.setattr(ctypes, "CDLL", Library)
    threads = [threading.Thread(target=native.register, args=(Options(), Table())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 6 and calls[::2] == calls[1::2]
