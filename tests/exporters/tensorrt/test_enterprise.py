"""Enterprise TensorRT, as far as it goes where it cannot be installed: TensorRT for RTX under its name.

The Python API is the same, so everything up to the library runs: finding it, the child, its timing cache.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from exporters.child_process import ProcessError
from exporters.tensorrt import build
from exporters.tensorrt import library as libraries
from exporters.tensorrt.build import Options, build_engines
from exporters.tensorrt.errors import BuildError, EngineError
from exporters.tensorrt.library import find
from exporters.tensorrt.manifest import EngineManifest

STAND_IN = """
from tensorrt_rtx import *
__version__ = "11.4.1"
"""
WITHOUT_TARGETS = """
class IBuilderConfig:
    "Of a library that builds for the GPU it finds."
"""
CRASHING = """
def Builder(logger):
    import os, sys
    print("terminate called without an active exception", file=sys.stderr, flush=True)
    os.abort()
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    folder = tmp_path / "packages"
    (about := folder / "tensorrt-11.4.1.dist-info").mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: tensorrt\nVersion: 11.4.1\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    libraries._probe.cache_clear()
    yield lambda more="": (folder / "tensorrt.py").write_text(STAND_IN + more) and None
    libraries._probe.cache_clear()


def test_a_timing_cache_is_read_and_written(install: Any, engines: Any, tmp_path: Path) -> None:
    install()
    bundle, _, _ = engines()
    timings = tmp_path / "timings"
    options = Options("tensorrt", "sm89", timing_cache=timings, graphs=("embed",))
    built = build_engines(bundle, tmp_path / "a", options)
    assert (built.manifest.library.backend, built.manifest.library.version) == ("tensorrt", "11.4.1")
    first = timings.read_bytes()
    assert first
    build_engines(bundle, tmp_path / "b", options)
    assert timings.read_bytes()
    manifest = EngineManifest.load(tmp_path / "b")
    manifest.check_library()
    with pytest.raises(EngineError, match="of tensorrt 11.4.1, here is 12.0"):
        manifest.check_library("12.0")


def test_it_takes_no_targets_by_name_where_its_config_has_none(install: Any, engines: Any, tmp_path: Path) -> None:
    install(WITHOUT_TARGETS)
    assert find("tensorrt").targets == ()
    bundle, _, _ = engines()
    with pytest.raises(EngineError, match="use --target native where that GPU is, or --backend tensorrt-rtx"):
        build_engines(bundle, tmp_path / "a", Options("tensorrt", "sm89"))


def test_a_crash_of_the_library_is_an_error_that_leaves_nothing(
    install: Any, engines: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(CRASHING)
    bundle, _, _ = engines()
    before = sorted(tmp_path.iterdir())
    expected = "tensorrt building embed.engine ended by SIGABRT; the last it said: .*terminate called"
    with pytest.raises(ProcessError, match=expected) as raised:
        build_engines(bundle, tmp_path / "out", Options("tensorrt", "sm89", graphs=("embed",)))
    assert "\n" not in str(raised.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(libraries.gpu() is not None, reason="with a GPU the library builds for it")
def test_what_the_library_says_of_a_failure_is_told(
    install: Any, engines: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told to build for the GPU that is here, where none is."""
    install()
    monkeypatch.setattr(build, "choose_targets", lambda library, asked: ("current",))
    bundle, _, _ = engines()
    with pytest.raises(BuildError, match=r"embed: tensorrt 11.4.1 built no engine: \[ERROR\].*CUDA driver") as raised:
        build_engines(bundle, tmp_path / "out", Options("tensorrt", "native", graphs=("embed",)))
    assert "\n" not in str(raised.value)
