"""`surgeon doctor` says what is wrong with broken libraries, and survives them."""

import json
import sys
from pathlib import Path

import pytest
import torch

from surgeon import probes
from surgeon.checkpoint.publish import staged
from surgeon.doctor import TIMEOUT, Diagnosis, diagnose
from surgeon.probes import BACKENDS, PACKAGES, run_check

BROKEN = {
    "torch": "raise OSError('libtorch_cpu.so: cannot open shared object file')",
    "transformers": "",
    "onnxscript": "",
    "onnx_ir": "",
    "tensorrt": "import os; os.abort()",
    "tensorrt_rtx": "raise ImportError('libtensorrt_rtx.so.1: wrong ELF class')",
    "triton": "raise RuntimeError('built for another torch')",
    "accelerate": "",
    "peft": "",
}


@pytest.fixture
def broken_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine where most libraries are there and broken: found first by every process that is started."""
    for module, content in BROKEN.items():
        (tmp_path / f"{module}.py").write_text(content + "\n")
        name = module.replace("_", "-")
        info = tmp_path / f"{module}-9.9.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)  # for the versions, which are read here
    return tmp_path


def test_broken_libraries_are_explained_and_end_nothing(broken_machine: Path, tmp_path_factory: pytest.TempPathFactory):
    diagnosis = diagnose(tmp_path_factory.mktemp("somewhere"))
    packages = {package.name: package for package in diagnosis.packages}
    assert list(packages) == ["python", *PACKAGES]
    assert "libtorch_cpu.so" in str(packages["torch"].problem)
    assert packages["transformers"].problem is None and packages["transformers"].version == "9.9"
    assert "SIGABRT" in str(packages["tensorrt"].problem)
    assert "not tried" in str(packages["triton"].problem)
    backends = {backend.name: backend for backend in diagnosis.backends}
    assert list(backends) == list(BACKENDS)
    assert backends["ONNX Runtime CPU"].works, backends["ONNX Runtime CPU"].detail
    assert "libtorch_cpu.so" in backends["torch CUDA"].detail
    assert "SIGABRT" in backends["TensorRT"].detail
    assert "wrong ELF class" in backends["TensorRT-RTX"].detail
    assert "built for another torch" in backends["Triton"].detail
    assert [name for name, backend in backends.items() if backend.works] == ["ONNX Runtime CPU"]
    assert diagnosis.storage.free_bytes is not None and "torch cannot be imported" in str(diagnosis.storage.problem)


def test_a_module_that_is_not_installed_is_named_with_what_installs_it(capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    run_check("Triton")
    printed = capsys.readouterr().out
    assert '"works": false' in printed and "pip install triton" in printed


@pytest.mark.parametrize(
    ("built", "available", "message"),
    [(False, True, "is built without CUDA"), (True, False, "finds no usable NVIDIA GPU"), (True, True, "on Test 9000")],
)
def test_what_torch_lacks_for_cuda_is_said(built: bool, available: bool, message: str, monkeypatch) -> None:
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda size, device: ones(size))
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Test 9000")
    result = probes._torch_cuda()
    assert result["works"] is (built and available) and message in result["detail"]


def test_links_of_a_directory_are_tried_and_leave_nothing(tmp_path: Path, capsys) -> None:
    run_check("storage", str(tmp_path))
    storage = json.loads(capsys.readouterr().out.strip().partition(" ")[2])
    (tmp_path / "a").touch()
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    assert storage["hardlink"] is True and isinstance(storage["reflink"], bool)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_what_killed_runs_left_is_named(broken_machine: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    where = tmp_path_factory.mktemp("models")
    for name in (".out.staging-0123abcd", ".gone.old-0123abcd", ".kept.old-0123abcd", "kept", ".git"):
        (where / name).mkdir()
    with staged(where / "now"):
        leftovers = {Path(each.path).name.rpartition("-")[0]: each for each in diagnose(where).leftovers}
    assert list(leftovers) == [".gone.old", ".kept.old", ".now.staging", ".out.staging"]
    assert "the next run that writes out removes it" in leftovers[".out.staging"].remedy
    assert leftovers[".gone.old"].only_copy and "rename it to gone" in leftovers[".gone.old"].remedy
    assert not leftovers[".kept.old"].only_copy
    assert leftovers[".now.staging"].use == "in use" and "leave it" in leftovers[".now.staging"].remedy


def test_a_directory_that_does_not_exist_is_said_and_the_rest_is_told(broken_machine: Path, tmp_path: Path) -> None:
    diagnosis = diagnose(tmp_path / "nowhere")
    assert isinstance(diagnosis, Diagnosis) and TIMEOUT > 10
    assert "No such file" in str(diagnosis.storage.problem) and diagnosis.storage.free_bytes is None
