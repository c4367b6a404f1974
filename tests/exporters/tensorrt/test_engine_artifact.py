"""`surgeon generate`, `validate` and `bench` of a directory of engines."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import has_tokenizer, tiny_checkpoint
from command import run
from exporters.artifact import artifact_kind
from exporters.bench.timed import open_timed
from exporters.export import export_bundle
from exporters.tensorrt import runtime as runtimes
from exporters.tensorrt.library import gpu
from exporters.tensorrt.profiles import Limits, Range
from exporters.validation.pair import open_pair
from exporters.validation.runners import EngineRunner
from exporters.validation.validate import validate_pair
from pairs import MIXIN, PLAIN, PVM, Pair, image
from patching import apply
from rehearsal import CpuDevice, make_engines
from surgeon.errors import SurgeonError
from surgeon.inputs import Prompt
from surgeon.parity.cases import own_case
from surgeon.parity.levels import FP16
from surgeon.parity.validate import validate

pytestmark = pytest.mark.skipif(not has_tokenizer(), reason="the demo checkpoint is not there")
LIMITS = Limits(prefill=Range.of(1, 48), batch=Range.of(1, 2))


@pytest.fixture
def pair(export: Callable[..., Pair]) -> Pair:
    return export("qwen3_vl", MIXIN + PVM, torch.float16)


@pytest.fixture
def path(pair: Pair, tmp_path: Path) -> Path:
    return make_engines(pair, tmp_path / "engines", LIMITS)


@pytest.fixture
def image_file(tmp_path: Path) -> Path:
    image(84, 84).save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.fixture
def rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "check_runnable", lambda path, manifest: None)
    monkeypatch.setattr(runtimes, "CudaDevice", lambda backend: CpuDevice())


def test_forms(pair: Pair, path: Path) -> None:
    assert [artifact_kind(each) for each in (pair.checkpoint, pair.bundle, path)] == ["checkpoint", "bundle", "engines"]
    assert artifact_kind("some/model-on-the-hub") == "checkpoint"


def test_generate(pair: Pair, path: Path, image_file: Path, rehearsed: None) -> None:
    arguments = ("--image", image_file, "--prompt", "What?", "--max-new-tokens", 6, "--json")
    answer, expected = (json.loads(run("generate", each, *arguments).stdout) for each in (path, pair.bundle))
    assert answer == expected and len(answer["token_ids"]) == 6


def test_validate(pair: Pair, path: Path, image_file: Path, rehearsed: None) -> None:
    done = run("validate", path, pair.checkpoint, "--image", image_file, "--prompt", "What?", "--steps", 4, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["passed"] and report["stages"] == ["checkpoint", "engine"] and report["dtypes"] == ["fp32", "fp16"]
    assert report["comparisons"][0]["cases"][0]["tokens_equal"] == 4
    assert run("validate", pair.bundle, path, "--image", image_file, "--prompt", "What?", "--steps", 2).exit_code == 0


def test_wrong_engines_fail_and_no_layer_is_named(
    pair: Pair, path: Path, image_file: Path, rehearsed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, candidate = open_pair(pair.bundle, path)
    assert isinstance(candidate, EngineRunner)
    started = candidate.runtime.start
    monkeypatch.setattr(candidate.runtime, "start", lambda *a, **k: (lambda s, x: (s, x[..., ::-1]))(*started(*a, **k)))
    report = validate(reference, candidate, own_case([image_file], "What?"), FP16, 2)
    assert not report.passed and report.cases[0].first_wrong is None


def test_engines_with_grafts_are_not_compared_with_a_plain_model(
    export: Callable[..., Pair], path: Path, rehearsed: None
) -> None:
    with pytest.raises(SurgeonError, match="engines do not show their gates: compare it with the patched checkpoint"):
        validate_pair(export("qwen3_vl", PLAIN).checkpoint, path)


def test_engines_behind_closed_gates_say_that_grafts_were_not_judged(
    tmp_path: Path, image_file: Path, rehearsed: None
) -> None:
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl", num_hidden_layers=2)
    apply(source, tmp_path / "patched", "pvm:layers=1,latent=32")
    export_bundle(tmp_path / "patched", tmp_path / "bundle", dtype=torch.float16, max_length=256, measure=False)
    fresh = Pair(tmp_path / "patched", tmp_path / "bundle")
    engines = make_engines(fresh, tmp_path / "engines", LIMITS)
    report = validate_pair(fresh.checkpoint, engines, [image_file], "What?", steps=2)
    assert report.passed and len(report.comparisons) == 1
    (note,) = [note for note in report.notes if "grafts" in note]
    assert "the grafts were not judged: 1 of 1 gates are closed" in note and "engines cannot be given others" in note


def test_bench(path: Path, rehearsed: None) -> None:
    timed = open_timed(path, [Prompt("Hello.")] * 2, threads=1)
    ends = timed.run(5)
    assert len(ends) == 5 and ends == sorted(ends)
    assert (timed.stage, timed.dtype, timed.device) == ("engine", "float16", "cpu")
    assert timed.device_memory() == sum(each.stat().st_size for each in path.glob("*.engine"))


@pytest.mark.skipif(gpu() is not None, reason="there is a GPU here")
@pytest.mark.parametrize("command", ["generate", "validate", pytest.param("bench", marks=pytest.mark.long)])
def test_without_a_gpu_it_is_one_line(pair: Pair, path: Path, command: str) -> None:
    arguments: Any = {"generate": (path,), "validate": (pair.checkpoint, path), "bench": (pair.bundle, path)}[command]
    done = run(command, *arguments, "--prompt", "What?")
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for part in ("nothing was run", "CUDA finds none here", "surgeon validate CKPT BUNDLE", f"surgeon inspect {path}"):
        assert part in line
    assert run("inspect", path).exit_code == 0


# -- what runs bundles -------------------------------------------------------------------------------------------
def test_backend_of_a_bundle(pair: Pair, path: Path) -> None:
    asked = ("--prompt", "What?", "--max-new-tokens", 2)
    assert run("generate", pair.bundle, *asked, "--backend", "ort-cpu").exit_code == 0
    for backend, reason in (("ort-cuda", "the CUDA provider"), ("ort-tensorrt-rtx", "the TensorRT-RTX provider")):
        done = run("generate", pair.bundle, *asked, "--backend", backend)
        if done.exit_code:
            (line,) = done.stderr.splitlines()
            assert done.exit_code == 2 and line.startswith(f"error: {reason} does not work here: ")
            assert run("validate", pair.checkpoint, pair.bundle, "--backend", backend).exit_code == 2
    for other in (pair.checkpoint, path):
        done = run("generate", other, *asked, "--backend", "ort-cpu")
        assert done.exit_code == 2 and "--backend ort-cpu is for bundles" in done.stderr
