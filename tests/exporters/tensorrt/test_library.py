"""Which libraries there are, and which GPUs they build for."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from exporters.tensorrt import library as libraries
from exporters.tensorrt.errors import EngineError
from exporters.tensorrt.library import Gpu, Library, choose_targets, find, installed_version, link_libraries

RTX = Library("tensorrt-rtx", "1.7.1", ("sm80", "sm89", "sm120"))
ENTERPRISE = Library("tensorrt", "11.4.1", ())


def no_gpu(monkeypatch: pytest.MonkeyPatch, gpu: Gpu | None = None) -> None:
    monkeypatch.setattr(libraries, "gpu", lambda: gpu)


def test_the_installed_library_tells_its_targets() -> None:
    library = find("tensorrt-rtx")
    assert library.version == installed_version("tensorrt-rtx")
    assert {"sm80", "sm89", "sm120"} <= set(library.targets)
    assert not {"native", "current", "none"} & set(library.targets)


def test_a_missing_library_is_told_with_what_works_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for backend in libraries.BACKENDS:
        with pytest.raises(EngineError, match=rf"pip install 'lvlm-surgeon\[{backend}\]'.*--dry-run") as raised:
            find(backend)
        assert "\n" not in str(raised.value)
        assert installed_version(backend) is None


def test_a_broken_library_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libcudart.so.99: cannot open shared object file')")
    stand_in(monkeypatch, tmp_path)
    with pytest.raises(EngineError, match="tensorrt is installed and does not work: .*libcudart.so.99.*surgeon doctor"):
        find("tensorrt")


def stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    libraries._probe.cache_clear()


@pytest.mark.parametrize(
    ("library", "asked", "expected"),
    [
        (RTX, "sm89", ("sm89",)),
        (RTX, "SM80, sm120,sm80", ("sm80", "sm120")),
    ],
)
def test_targets_by_name(library: Library, asked: str, expected: tuple[str, ...]) -> None:
    assert choose_targets(library, asked) == expected


@pytest.mark.parametrize(
    ("library", "asked", "message"),
    [
        (RTX, "sm90", "unknown target 'sm90'; tensorrt-rtx 1.7.1 builds for sm80, sm89, sm120, or native"),
        (RTX, "native", "no GPU here that CUDA can use; name the GPU to build for instead: sm80, sm89, sm120"),
        (ENTERPRISE, "native", "no GPU here that CUDA can use; build where the GPU is"),
        (ENTERPRISE, "sm89", "tensorrt builds for the GPU that it finds; use --target native"),
        (RTX, "native,sm89", "native stands alone"),
        (RTX, " , ", "--target needs one of"),
    ],
)
def test_targets_that_cannot_be(monkeypatch: pytest.MonkeyPatch, library: Library, asked: str, message: str) -> None:
    no_gpu(monkeypatch)
    with pytest.raises(EngineError, match=message):
        choose_targets(library, asked)


def test_native_is_the_gpu_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpu(monkeypatch, Gpu("NVIDIA L40", "sm89"))
    assert choose_targets(RTX, "native") == ("sm89",)
    assert choose_targets(ENTERPRISE, "native") == (), "it builds for what it finds"
    # one that this library does not list: whether it takes it is for it to say
    no_gpu(monkeypatch, Gpu("NVIDIA H200", "sm90"))
    assert choose_targets(RTX, "native") == ()


def test_links_bear_names_without_a_version(tmp_path: Path) -> None:
    folder = link_libraries("tensorrt-rtx", tmp_path / "lib")
    assert (folder / "libtensorrt_rtx.so").resolve().name.startswith("libtensorrt_rtx.so.")
    assert all(link.name.endswith(".so") and link.exists() for link in folder.iterdir())


def test_the_gpu_is_what_torch_finds() -> None:
    import torch

    gpu: Any = libraries.gpu()
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(0)
        assert gpu == Gpu(torch.cuda.get_device_name(0), f"sm{major}{minor}")
    else:
        assert gpu is None
