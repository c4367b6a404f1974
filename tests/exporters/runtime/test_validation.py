"""`surgeon validate`: the rung between two forms of a model, what holds on it, and where a broken form goes wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgeon
from checkpoints import MODEL_TYPES, tiny_checkpoint
from command import run
from exporters.onnx.bundle import export_bundle
from exporters.runtime.validation import validate_pair
from pairs import MIXIN, PVM, Pair
from patching import apply
from surgeon.errors import SurgeonError, TooLongError

Export = Callable[..., Pair]
STEPS = 6
CHART = Path(surgeon.__file__).parent / "parity" / "data" / "chart.png"


def damaged(checkpoint: Path, target: Path, key: str) -> Path:
    """A copy of a checkpoint with one matrix doubled."""
    shutil.copytree(checkpoint, target)
    for file in target.glob("*.safetensors"):
        weights = load_file(file)
        found = [name for name in weights if name.endswith(key)]
        if found:
            weights[found[0]] *= 2
            save_file(weights, file, {"format": "pt"})
            return target
    raise AssertionError(f"no {key} in {checkpoint}")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_fresh_patch_is_its_source_whichever_is_named_first(model_type: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", model_type, torch.bfloat16)
    apply(source, tmp_path / "patched", "pvm:layers=1,latent=32")
    for pair in ((source, tmp_path / "patched"), (tmp_path / "patched", source)):
        report = validate_pair(*pair, steps=STEPS)
        assert report.passed and report.rung.name == "identity" and report.reference == str(source)
        assert all(case.prefill.equal and case.decode.equal for case in report.cases)
        assert [case.tokens_equal for case in report.cases] == [STEPS, STEPS, STEPS, 3 * STEPS]


def test_cases_that_a_bundle_is_too_short_for_are_left_out_and_named(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl")
    export_bundle(source, tmp_path / "bundle", dtype=torch.float32, max_length=40)
    report = validate_pair(source, tmp_path / "bundle", steps=STEPS)
    assert report.passed and [case.name for case in report.cases] == ["one picture", "text only"]
    assert len(report.notes) == 2 and all("40" in note for note in report.notes)
    assert "left out 'three pictures'" in report.notes[0]
    with pytest.raises(TooLongError, match="40"):
        validate_pair(source, tmp_path / "bundle", images=[CHART] * 4, steps=STEPS)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize(("dtype", "rung"), [(torch.float32, "fp32"), (torch.float16, "fp16")])
def test_a_bundle_is_its_checkpoint(model_type: str, dtype: torch.dtype, rung: str, export: Export) -> None:
    pair = export(model_type, dtype=dtype)
    report = validate_pair(pair.bundle, pair.checkpoint, steps=STEPS)
    assert report.rung.name == rung and report.reference == str(pair.checkpoint)
    assert report.passed, [case.failures for case in report.cases]


def test_a_trained_patch_is_reported_not_judged(export: Export) -> None:
    pair = export("qwen3_vl")
    report = validate_pair(pair.checkpoint.parent / "source", pair.checkpoint, steps=STEPS)
    assert report.rung.name == "tuned" and report.passed
    assert max(case.prefill.max_abs for case in report.cases) > 0.1
    text_only = next(case for case in report.cases if not case.pictures)
    assert text_only.prefill.equal and text_only.decode.equal
    assert "layers.1.pvm" in report.notes[0] and report.notes[1].startswith("0 tensors")


def test_tiles_at_other_ids_are_reported_and_with_plain_ones_judged(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "internvl", num_hidden_layers=2)
    apply(source, tmp_path / "patched", "mixin:layers=1", "rope-dhr")
    moved = validate_pair(source, tmp_path / "patched", steps=2)
    assert moved.rung.name == "positions" and moved.passed and moved.reference == str(source)
    assert max(case.prefill.max_abs for case in moved.cases) > 0.1
    text_only = next(case for case in moved.cases if not case.pictures)
    assert text_only.prefill.equal and text_only.decode.equal
    judged = validate_pair(source, tmp_path / "patched", steps=2, positions="plain")
    assert judged.rung.name == "identity" and judged.passed
    with pytest.raises(SurgeonError, match="has no RoPE-DHR"):
        validate_pair(source, tmp_path / "patched", steps=2, positions="dhr")

    apply(source, tmp_path / "memory", "mixin:layers=1,tiles=memory")
    with pytest.raises(SurgeonError, match="tiles go to the memory alone"):
        validate_pair(source, tmp_path / "memory", steps=2)


@pytest.mark.parametrize("positions", ["dhr", "plain"])
def test_the_command_takes_positions(export: Export, positions: str) -> None:
    pair = export("internvl", (*MIXIN, *PVM, "rope-dhr:tile_order=column"))
    own = ("--image", CHART, "--prompt", "What is this?")
    held = run("validate", pair.checkpoint, pair.bundle, *own, "--steps", 3, "--positions", positions, "--json")
    assert held.exit_code == 0, held.output
    assert json.loads(held.stdout)["rung"]["name"] == "fp32"
    texts = []
    for path in (pair.checkpoint, pair.bundle):
        said = run("generate", path, *own, "--max-new-tokens", 6, "--positions", positions, "--json")
        assert said.exit_code == 0, said.output
        texts.append(json.loads(said.stdout))
    assert texts[0] == texts[1]
    refused = run("generate", export("qwen3_vl").bundle, *own, "--positions", "dhr")
    assert refused.exit_code == 2 and "has no RoPE-DHR positions" in refused.stderr


def test_a_trained_bundle_beside_its_source(export: Export) -> None:
    pair = export("qwen3_vl")
    report = validate_pair(pair.checkpoint.parent / "source", pair.bundle, steps=2)
    assert report.rung.name == "tuned" and report.passed
    assert "layers.1.pvm 0.8" in report.notes[0]


def test_the_first_wrong_layer_of_a_bundle_is_named(export: Export, tmp_path: Path) -> None:
    pair = export("qwen3_vl")
    broken = damaged(pair.checkpoint, tmp_path / "broken", "layers.1.mlp.down_proj.weight")
    report = validate_pair(broken, pair.bundle, steps=STEPS)
    assert not report.passed
    assert all((case.first_wrong or "").startswith("hidden_states.1,") for case in report.cases)


def test_a_changed_backbone_under_closed_gates_is_no_identity(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl")
    apply(source, tmp_path / "patched", "pvm:layers=1,latent=32")
    broken = damaged(tmp_path / "patched", tmp_path / "broken", "layers.2.self_attn.o_proj.weight")
    report = validate_pair(source, broken, steps=STEPS)
    assert report.rung.name == "identity" and not report.passed
    assert (report.cases[0].first_wrong or "").startswith("hidden_states.2,")


def test_other_models_are_refused(export: Export, tmp_path: Path) -> None:
    other = tiny_checkpoint(tmp_path / "other", "qwen3_vl", num_hidden_layers=2)
    with pytest.raises(SurgeonError, match="not forms of one model"):
        validate_pair(other, export("qwen3_vl").bundle)


def test_the_command_exits_with_the_verdict_and_writes_the_report(export: Export, tmp_path: Path) -> None:
    pair, file = export("qwen3_vl"), tmp_path / "report.json"
    own = ("--prompt", "What is this?", "--steps", 3)
    held = run("validate", pair.checkpoint, pair.bundle, *own, "--report", file)
    assert held.exit_code == 0, held.output
    assert "held" in held.stdout and "passed in" in held.stdout
    written = json.loads(file.read_text())
    assert written["passed"] is True and written["cases"][0]["tokens_equal"] == 3

    again = run("validate", pair.checkpoint, pair.bundle, *own, "--report", file)
    assert again.exit_code == 2 and "--overwrite" in again.stderr

    broken = damaged(pair.checkpoint, tmp_path / "broken", "layers.0.mlp.down_proj.weight")
    failed = run("validate", broken, pair.bundle, *own, "--json")
    assert failed.exit_code == 1
    assert json.loads(failed.stdout)["passed"] is False

    nothing = run("validate", tmp_path / "nothing", pair.bundle)
    assert nothing.exit_code == 2 and nothing.stderr.startswith("error: ")
