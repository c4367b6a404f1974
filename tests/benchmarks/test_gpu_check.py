import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks._measure import ROOT, Spread
from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import decoding, generating, grafts, numbers
from benchmarks.gpu_check.counting import counted_chains
from benchmarks.gpu_check.grafts import mixin, pvm
from benchmarks.gpu_check.part import PartReport, Setting
from benchmarks.gpu_check.timing import RehearsalTimer
from exporters.kernels import support
from exporters.kernels.cuda import pvm as fused_pvm
from exporters.kernels.workload import Size, draw, memory_workload

COMMAND = [sys.executable, "-m", "benchmarks.gpu_check"]
GPU = {"name": "NVIDIA Test 9000", "slug": "nvidia-test-9000"}


def scripts(**parts: str) -> Callable[[str, bool, Path], list[str]]:
    """Parts that run these lines of Python."""
    return lambda name, dry, out: [sys.executable, "-c", parts[name]]


@pytest.mark.long
def test_a_rehearsal_runs_a_part_and_writes_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "--dry", "--parts", "mixin", "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "CUDA graph: fused adds: (not measured: a rehearsal)" in done.stdout
    assert done.stdout.endswith("nothing was measured, and nothing is written.\n")
    assert "ms/token" not in done.stdout
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_it_says_so_at_once(capsys: pytest.CaptureFixture) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu_check.main([]) == 2
    assert "finds no CUDA device; `make gpu-check DRY=1` rehearses it" in capsys.readouterr().err


def test_a_part_that_fails_does_not_lose_the_others(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    command = scripts(
        numbers="raise SystemExit(3)",
        pvm="import os; os.abort()",
        mixin="raise SystemExit(77)",
        engines="print('here')",
    )
    assert gpu_check.run_all(["numbers", "pvm", "mixin", "engines"], False, tmp_path, command) == 1
    output = capfd.readouterr().out
    assert "here" in output
    for line in (
        "numbers: FAILED with exit code 3",
        "pvm: FAILED with exit code -6",
        "mixin: skipped",
        "engines: done",
    ):
        assert line in output
    assert gpu_check.run_all(["mixin", "engines"], False, tmp_path, command) == 0


def test_parts_get_the_time_that_is_spare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_check.PARTS, "numbers", dataclasses.replace(gpu_check.PARTS["numbers"], seconds=0))
    command = scripts(numbers="import time; time.sleep(1.5)")
    assert gpu_check.run_all(["numbers"], False, tmp_path, command) == 1
    assert gpu_check.run_all(["numbers"], False, tmp_path, command, spare=30) == 0


def test_a_part_that_takes_too_long_ends_with_all_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    part = dataclasses.replace(gpu_check.PARTS["numbers"], seconds=2)
    monkeypatch.setitem(gpu_check.PARTS, "numbers", part)
    started = tmp_path / "started"
    child = f"import os, time; open({str(started)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    command = scripts(
        numbers=f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])", engines="print('here')"
    )
    assert gpu_check.run_all(["numbers", "engines"], False, tmp_path, command) == 1
    output = capfd.readouterr().out
    assert "numbers: FAILED: out of time" in output and "engines: done" in output
    status = Path(f"/proc/{started.read_text()}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"


def test_figures_are_written_as_they_come(tmp_path: Path) -> None:
    setting = Setting(dry=False, out=tmp_path)
    report = PartReport("pvm", setting, GPU, {"copy, GB/s": 100.0})
    path = tmp_path / "nvidia-test-9000-pvm.json"
    report.check("fused adds", Spread((0.05, 0.04)), "<=", 0.06, "ms")
    written = json.loads(path.read_text())
    assert written["checks"][0]["met"] and not written["complete"]
    assert written["ceilings"] == {"copy, GB/s": 100.0}
    assert "torch" in written["machine"]["versions"] and "triton" in written["machine"]["versions"]
    report.save(complete=True)
    assert json.loads(path.read_text())["complete"]


class ModelRequested(Exception):
    """`make_model` was called, with this config and device."""


def test_models_have_the_published_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no rehearsal asks for."""

    def make_model(config, dtype, device):  # type: ignore[no-untyped-def]
        raise ModelRequested(config, device)

    monkeypatch.setattr(grafts, "make_model", make_model)
    monkeypatch.setattr(generating, "check_tokens", lambda *arguments: None)
    sizes = []
    for part in (decoding.pvm_8b, decoding.mixin_2b, generating.main):
        with pytest.raises(ModelRequested) as raised:
            part(Setting(dry=False, out=tmp_path), RehearsalTimer(), None)
        config, device = raised.value.args
        text = config.get_text_config()
        layers = config.surgeon["grafts"][0]["layers"]
        sizes.append((device, text.hidden_size, text.intermediate_size, text.num_hidden_layers, len(layers)))
    assert sizes == [("cuda", 4096, 12288, 36, 3), ("cuda", 2048, 8192, 24, 6), ("cuda", 4096, 12288, 36, 3)]


@torch.inference_mode()
def test_a_model_that_computes_by_plain_definitions_does_not_pass_for_fused(tmp_path: Path) -> None:
    """As every one does on the CPU."""
    setting = Setting(dry=True, out=tmp_path)
    model = grafts.make_model(grafts.qwen3_vl(grafts.SMALL_TEXT, grafts.SMALL_PVM), torch.bfloat16, "cpu")
    step = decoding.Step(*decoding.parts_of(model), batch=1, context=8, slots=6)
    report = PartReport("pvm", setting, GPU, {})
    assert decoding.compare_logits(step, report, "here") == ["here, fused: fused kernels ran {}, not {'pvm': 1}"]
    inputs, clock = generating.prompt(model, 4, 3), RehearsalTimer()
    assert len(generating.generate(False, model, inputs, 3, clock, disable_compile=True)[0]) == 3
    with pytest.raises(AssertionError, match=r"ran \{\}, not \{'pvm': 3, 'pvm_memory': 1\}"):
        generating.generate(True, model, inputs, 3, clock, disable_compile=True)


def test_fused_kernels_are_counted_and_what_they_do_not_take_is_not() -> None:
    graft = pvm(72, 64, 40, 32, 1)
    inputs = [*draw(memory_workload(graft, Size(1, 1, 20, "float32"))[1], "cpu").values()]
    support.warn_once.cache_clear()
    with counted_chains() as chains:
        fused_pvm.fused_memory(*inputs, graft.eps)
        with pytest.warns(UserWarning, match="no fused kernel for tensors of bfloat16, float32"):
            fused_pvm.fused_memory(*inputs[:-1], inputs[-1].bfloat16(), graft.eps)
    assert chains == {"pvm_memory": 1}


@pytest.mark.parametrize("graft", [pvm(72, 64, 40, 32, 1), mixin(72, 3, 40, 32)], ids=["pvm", "mixin"])
@pytest.mark.parametrize("size", [Size(1, 1, 20, "float32"), Size(2, 7, 20, "bfloat16", True, True)], ids=str)
def test_the_kernels_are_right(graft: torch.nn.Module, size: Size) -> None:
    findings = [*numbers.check_reading(graft, size, "cpu", "here"), *numbers.check_filling(graft, size, "cpu", "here")]
    assert [each for each in findings if not each.ok] == []
    assert len(findings) > 10


def test_a_kernel_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch_wrong(step, inputs):  # type: ignore[no-untyped-def]
        outputs = right(step, inputs)
        if step.name == "pvm_swiglu":
            outputs["y"][..., 3] *= 1.01
        return outputs

    right = numbers.launch
    monkeypatch.setattr(numbers, "launch", launch_wrong)
    size = Size(1, 1, 20, "float32")
    wrong = [each.what for each in numbers.check_reading(pvm(72, 64, 40, 32, 1), size, "cpu", "x") if not each.ok]
    assert wrong == ["pvm_swiglu: y, x"]


def test_what_a_kernel_does_not_write_is_found() -> None:
    with numbers.poisoned():
        unwritten = torch.empty(3)
    assert math.isnan(numbers.relative(unwritten, torch.zeros(3)))
    assert not numbers.Finding("x", math.nan, 1.0).ok
    assert math.isnan(numbers.relative(torch.ones(2), torch.ones(2, 1)))
