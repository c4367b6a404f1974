"""`surgeon validate`: the level between two forms of a model, what holds on it, and where a broken form goes wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import surgeon
from checkpoints import QWEN_TYPES, tiny_checkpoint
from command import assert_refused, run
from exporters.export import export_bundle
from exporters.onnx import functions
from exporters.onnx import trace as tracing
from exporters.onnx.memory import MemoryProjection
from exporters.validation.runners import BundleRunner
from exporters.validation.validate import validate_pair
from pairs import MIXIN, PVM, Pair
from passes.pvm import PVM as PVM_PASS
from patching import apply
from surgeon.checkpoint import Checkpoint
from surgeon.console import report_validation
from surgeon.errors import OptionError, SurgeonError, TooLongError
from surgeon.live import graft
from surgeon.models import load
from surgeon.parity.cases import own_case
from surgeon.parity.torch_runner import TorchRunner
from traced_once import trace_afresh

Export = Callable[..., Pair]
STEPS = 6
CHART = Path(surgeon.__file__).parent / "parity" / "data" / "chart.png"


def damaged(checkpoint: Path, target: Path, key: str) -> Path:
    """A copy of a checkpoint with one matrix doubled."""
    shutil.copytree(checkpoint, target)
    for file in target.glob("*.safetensors"):
        weights = load_file(file)
        names = [name for name in weights if name.endswith(key)]
        if names:
            weights[names[0]] *= 2
            save_file(weights, file, {"format": "pt"})
            return target
    raise AssertionError(f"no {key} in {checkpoint}")


def rewritten(checkpoint: Path, key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change the tensors of a checkpoint, in place, whose name ends with `key`."""
    names = 0
    for file in checkpoint.glob("*.safetensors"):
        weights = load_file(file)
        own = [name for name in weights if name.endswith(key)]
        names += len(own)
        if own:
            file.unlink()  # it may share its bytes with another
            save_file(weights | {name: change(weights[name]) for name in own}, file, {"format": "pt"})
    assert names


def set_gates(checkpoint: Path, value: float) -> None:
    rewritten(checkpoint, "pvm.alpha", lambda gate: torch.full_like(gate, value))


def altered(checkpoint: Path, key: str) -> None:
    """One value of a tensor a little larger."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] += 1e-6
        return tensor

    rewritten(checkpoint, key, change)


@pytest.mark.parametrize("model_type", QWEN_TYPES)
def test_a_fresh_patch_is_its_source_whichever_is_named_first(model_type: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", model_type, torch.bfloat16)
    apply(source, tmp_path / "patched", "pvm:layers=1,latent=32")
    for pair in ((source, tmp_path / "patched"), (tmp_path / "patched", source)):
        report = validate_pair(*pair, steps=STEPS)
        assert report.passed and report.reference == str(source)
        (identity,) = report.comparisons
        assert identity.level.name == "identity" and identity.state == "as they are"
        assert all(case.prefill.equal and case.decode.equal for case in identity.cases)
        assert [case.tokens_equal for case in identity.cases] == [STEPS, STEPS, STEPS, 3 * STEPS]


def test_cases_that_a_bundle_is_too_short_for_are_left_out_and_named(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl")
    export_bundle(source, tmp_path / "bundle", dtype=torch.float32, max_length=40)
    report = validate_pair(source, tmp_path / "bundle", steps=STEPS)
    assert report.passed and [case.name for case in report.comparisons[0].cases] == ["one image", "text only"]
    left_out = [note for note in report.all_notes() if note.startswith("left out")]
    assert len(left_out) == 2 and all("40" in note for note in left_out)
    assert "left out 'three images'" in left_out[0]
    with pytest.raises(TooLongError, match="40"):
        validate_pair(source, tmp_path / "bundle", images=[CHART] * 4, steps=STEPS)


@pytest.mark.parametrize("model_type", QWEN_TYPES)
@pytest.mark.parametrize(("dtype", "level"), [(torch.float32, "fp32"), (torch.float16, "fp16")])
def test_a_bundle_is_its_checkpoint(model_type: str, dtype: torch.dtype, level: str, export: Export) -> None:
    pair = export(model_type, dtype=dtype)
    report = validate_pair(pair.bundle, pair.checkpoint, steps=STEPS)
    assert [each.level.name for each in report.comparisons] == [level] and report.reference == str(pair.checkpoint)
    assert report.passed, report.to_json()


def test_a_trained_patch_is_its_source_once_its_gates_are_closed(export: Export) -> None:
    pair = export("qwen3_vl")
    before = {file: file.read_bytes() for file in pair.checkpoint.glob("*.safetensors")}
    report = validate_pair(pair.checkpoint.parent / "source", pair.checkpoint, steps=STEPS)
    assert report.passed and [each.level.name for each in report.comparisons] == ["identity", "tuned"]
    judged, reported = report.comparisons
    assert judged.state == "gates closed in memory"
    assert all(case.prefill.equal and case.decode.equal for case in judged.cases)
    assert reported.verdict == "not judged" and max(case.prefill.max_abs for case in reported.cases) > 0.1
    text_only = next(case for case in reported.cases if not case.images)
    assert text_only.prefill.equal and text_only.decode.equal
    assert any("layers.1.pvm 0.8" in note for note in report.notes)
    assert [check.name for check in report.checks if not check.failures][-1] == "weights"
    assert before == {file: file.read_bytes() for file in pair.checkpoint.glob("*.safetensors")}


def test_a_model_that_computes_otherwise_over_the_same_tensors_fails(export: Export, tmp_path: Path) -> None:
    pair = export("qwen3_vl")
    other = Path(shutil.copytree(pair.checkpoint, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 1e-3
    (other / "config.json").write_text(json.dumps(config))
    report = validate_pair(pair.checkpoint.parent / "source", other, steps=2)
    assert not report.checks[-1].failures and report.verdict == "failed"
    assert [each.verdict for each in report.comparisons] == ["failed", "not judged"]


@pytest.mark.parametrize("gate", [0.0, pytest.param(1e-30, marks=pytest.mark.long), 0.8])
def test_another_backbone_fails_whatever_the_gates_are(gate: float, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl", num_hidden_layers=2)
    other = tiny_checkpoint(tmp_path / "other", "qwen3_vl", num_hidden_layers=2, seed=1)
    apply(other, tmp_path / "patched", "pvm:layers=1,latent=32")
    set_gates(tmp_path / "patched", gate)
    report = validate_pair(source, tmp_path / "patched", steps=2)
    assert report.verdict == "failed"
    (weights,) = [check for check in report.checks if check.name == "weights"]
    assert "the first) of the backbone with other values" in weights.failures[0]
    assert "--backbone-tuned" in weights.failures[0]

    done = run("validate", source, tmp_path / "patched", "--steps", 2, "--backbone-tuned", "--json")
    assert done.exit_code == 0, done.output
    accepted = json.loads(done.stdout)
    judged, reported = accepted["comparisons"]
    assert judged["verdict"] == "passed" and "the reference with the candidate's backbone" in judged["state"]
    assert reported["verdict"] == "not judged" and min(c["prefill"]["cosine"] for c in reported["cases"]) < 0.5


def test_where_tensors_lie_in_their_file_changes_no_verdict(tmp_path: Path) -> None:
    """A gate of one value, saved among the others, moves all that follow by four bytes."""
    source = tiny_checkpoint(tmp_path / "source", "internvl", num_hidden_layers=2)
    moved = Path(shutil.copytree(source, tmp_path / "moved"))
    for file in moved.glob("*.safetensors"):
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        file.unlink()
        file.write_bytes((size + 4).to_bytes(8, "little") + data[8 : 8 + size] + b"    " + data[8 + size :])
    model = TorchRunner(moved).model
    assert all(tensor.data_ptr() % 64 == 0 for tensor in model.state_dict().values())
    report = validate_pair(source, moved, prompt="Hello!", steps=4)
    assert report.passed, report.to_json()
    # and as a graft in memory saves them
    model = load(source)
    graft(model, PVM_PASS(layers=[1], latent=32)).save_pretrained(tmp_path / "saved")
    for file in source.iterdir():
        if not (tmp_path / "saved" / file.name).exists() and file.suffix != ".safetensors":
            shutil.copy(file, tmp_path / "saved")
    assert validate_pair(source, tmp_path / "saved", images=[CHART], steps=4).passed


def test_a_record_without_its_passes_is_said_to_be_unjudged(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl", num_hidden_layers=1)
    apply(source, tmp_path / "patched", "pvm:layers=0,latent=32")
    assert not any("not judged" in note for note in validate_pair(source, tmp_path / "patched", steps=1).notes)
    config = json.loads((tmp_path / "patched" / "config.json").read_text())
    config["surgeon"]["passes"] = []
    (tmp_path / "patched" / "config.json").write_text(json.dumps(config))
    notes = validate_pair(source, tmp_path / "patched", prompt="Hi", steps=1).notes
    assert any("options of the grafts were not judged" in note for note in notes)


def test_one_altered_tensor_fails_where_no_logit_shows_it(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl", num_hidden_layers=2)
    apply(source, tmp_path / "patched", "pvm:layers=1,latent=32")
    altered(tmp_path / "patched", "visual.blocks.0.mlp.linear_fc1.bias")
    report = validate_pair(source, tmp_path / "patched", prompt="Hello!", steps=2)
    assert report.verdict == "failed" and report.comparisons[0].passed
    assert "1 tensor (model.visual.blocks.0.mlp.linear_fc1.bias)" in report.checks[-1].failures[0]


def test_settings_that_make_a_prompt_unusable_are_what_is_told(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl", num_hidden_layers=1)
    other = Path(shutil.copytree(source, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"image_token_id": config["image_token_id"] - 1}))
    done = run("validate", source, other, "--image", CHART, "--prompt", "What?", "--steps", 1)
    assert done.exit_code == 1
    assert "image_token_id is" in done.stdout and "nothing more was compared: " in done.stdout, done.output


def test_unrelated_checkpoints_of_one_shape_fail_and_are_not_judged_by_request(tmp_path: Path) -> None:
    a = tiny_checkpoint(tmp_path / "a", "qwen3_vl", num_hidden_layers=1)
    b = tiny_checkpoint(tmp_path / "b", "qwen3_vl", num_hidden_layers=1, seed=1)
    assert validate_pair(a, b, steps=1).verdict == "failed"
    own = ("--prompt", "Hello!", "--steps", 1)
    done = run("validate", a, b, *own, "--backbone-tuned")
    assert done.exit_code == 1
    assert "NOT JUDGED in" in done.stdout and "leave it out" in done.stdout
    assert "passed" not in done.stdout
    assert run("validate", a, a, *own).exit_code == 0


def test_other_values_in_the_grafts_of_both_fail_unless_they_were_tuned(export: Export, tmp_path: Path) -> None:
    """With their gates open they compute something else; with their gates closed nothing shows that."""
    pair = export("qwen3_vl")
    other = Path(shutil.copytree(pair.checkpoint, tmp_path / "other"))
    rewritten(other, "layers.1.pvm.output_proj.weight", lambda weight: weight.flip(0))
    own = ("--image", CHART, "--prompt", "What is this?", "--steps", 1)
    done = run("validate", pair.checkpoint, other, *own)
    assert done.exit_code == 1
    assert "1 tensor (model.language_model.layers.1.pvm.output_proj.weight) of the grafts" in done.stdout
    assert "--grafts-tuned" in done.stdout and "value for value" not in done.stdout

    report = validate_pair(pair.checkpoint, other, [CHART], "What is this?", steps=1, grafts_tuned=True)
    weights = next(check for check in report.checks if check.name == "weights")
    assert (
        report.passed and weights.said.startswith("the other tensors of the reference") and "1 tensor" in weights.said
    )
    judged, reported = report.comparisons
    assert judged.state == "gates closed in memory" and judged.cases[0].prefill.equal
    assert reported.verdict == "not judged" and reported.cases[0].prefill.max_abs > 0
    with pytest.raises(SurgeonError, match="--grafts-tuned is for two checkpoints"):
        validate_pair(pair.checkpoint, pair.bundle, steps=1, grafts_tuned=True)


def test_grafts_of_another_size_of_gate_are_not_blamed_on_rounding(export: Export, tmp_path: Path) -> None:
    pair = export("qwen3_vl")
    other = Path(shutil.copytree(pair.checkpoint, tmp_path / "other"))
    rewritten(other, "layers.1.pvm.alpha", torch.zeros_like)
    report = validate_pair(other, pair.bundle, [CHART], "What is this?", steps=1)
    assert report.verdict == "failed"
    assert not any("rounding" in note for note in report.all_notes())
    assert any("differ without them" in note for note in report.all_notes())


def test_one_image_needs_no_list_and_a_model_in_memory_is_refused(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl", num_hidden_layers=1)
    (case,) = validate_pair(source, source, str(CHART), "What?", steps=1).comparisons[0].cases
    assert case.images == 1
    with pytest.raises(OptionError, match="cannot validate a Qwen3VL.* in memory: write it with surgeon.save"):
        validate_pair(source, load(source))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="cannot export a Qwen3VL.* in memory: write it with surgeon.save"):
        export_bundle(load(source), tmp_path / "bundle", dtype="fp32")  # type: ignore[arg-type]


def test_without_an_image_nothing_is_proved_of_grafts(tmp_path: Path) -> None:
    """All prompts with one are longer than the bundle takes."""
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl", num_hidden_layers=2)
    apply(source, tmp_path / "patched", "pvm:layers=1,latent=32")
    export_bundle(tmp_path / "patched", tmp_path / "bundle", dtype=torch.float32, max_length=24, measure=False)
    done = run("validate", tmp_path / "patched", tmp_path / "bundle", "--steps", 1)
    assert done.exit_code == 1, done.output
    assert "NOT JUDGED" in done.stdout and "--max-length" in done.stdout


def test_what_a_coarser_dtype_rounds_is_not_said_to_be_equal(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl", torch.bfloat16, num_hidden_layers=1)
    model = load(source, dtype=torch.float32)
    model.save_pretrained(tmp_path / "wide")
    for file in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.jinja"):
        shutil.copy(source / file, tmp_path / "wide")
    summaries = [
        check.said
        for check in validate_pair(source, tmp_path / "wide", prompt="Hello!", steps=1).checks
        if check.name == "weights"
    ]
    assert summaries[0].endswith("value for value") and "rounds" not in summaries[0]
    altered(tmp_path / "wide", "mlp.down_proj.weight")
    report = validate_pair(source, tmp_path / "wide", prompt="Hello!", steps=1)
    (weights,) = [check for check in report.checks if check.name == "weights"]
    assert "1 tensor (model.language_model.layers.0.mlp.down_proj.weight) of them as bf16 rounds it" in weights.said


def test_tied_tensors_are_counted_once(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "source", "qwen3_vl", num_hidden_layers=1)
    report = validate_pair(checkpoint, checkpoint, prompt="Hello!", steps=1)
    summary = next(check.said for check in report.checks if check.name == "weights")
    with Checkpoint.open(checkpoint) as opened:
        assert f"all {len(opened.tensors)} tensors" in summary


def test_tiles_at_other_ids_are_reported_and_with_plain_ones_judged(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "internvl", num_hidden_layers=2)
    apply(source, tmp_path / "patched", "mixin:layers=1", "rope-dhr")
    report = validate_pair(source, tmp_path / "patched", steps=2)
    assert report.passed and report.reference == str(source)
    judged, moved = report.comparisons
    assert (judged.level.name, judged.state, moved.level.name) == ("identity", "plain positions in memory", "positions")
    assert all(case.prefill.equal and case.decode.equal for case in judged.cases)
    assert moved.verdict == "not judged" and max(case.prefill.max_abs for case in moved.cases) > 0.1
    text_only = next(case for case in moved.cases if not case.images)
    assert text_only.prefill.equal and text_only.decode.equal
    shown = run("validate", source, tmp_path / "patched", "--steps", 2).stdout.splitlines()
    start = next(i for i, line in enumerate(shown) if line.startswith("level      positions"))
    assert [line.split()[-1] for line in shown[start + 2 : start + 6]] == ["reported"] * 4

    plain = validate_pair(source, tmp_path / "patched", steps=2, positions="plain")
    assert plain.passed and [each.level.name for each in plain.comparisons] == ["identity"]
    with pytest.raises(SurgeonError, match="has no RoPE-DHR"):
        validate_pair(source, tmp_path / "patched", steps=2, positions="dhr")

    broken = damaged(tmp_path / "patched", tmp_path / "broken", "layers.1.mlp.down_proj.weight")
    assert validate_pair(source, broken, steps=2).verdict == "failed"

    apply(source, tmp_path / "memory", "mixin:layers=1,tiles=memory")
    with pytest.raises(SurgeonError, match="tiles go to the memory alone"):
        validate_pair(source, tmp_path / "memory", steps=2)


@pytest.mark.parametrize("positions", ["dhr", "plain"])
def test_the_command_takes_positions(export: Export, positions: str) -> None:
    pair = export("internvl", (*MIXIN, *PVM, "rope-dhr:tile_order=column"))
    own = ("--image", CHART, "--prompt", "What is this?")
    result = run("validate", pair.checkpoint, pair.bundle, *own, "--steps", 3, "--positions", positions, "--json")
    assert result.exit_code == 0, result.output
    assert [each["level"]["name"] for each in json.loads(result.stdout)["comparisons"]] == ["fp32"]
    texts = []
    for path in (pair.checkpoint, pair.bundle):
        answer = run("generate", path, *own, "--max-new-tokens", 6, "--positions", positions, "--json")
        assert answer.exit_code == 0, answer.output
        texts.append(json.loads(answer.stdout))
    assert texts[0] == texts[1]
    refused = run("generate", export("qwen3_vl").bundle, *own, "--positions", "dhr")
    assert refused.exit_code == 2 and "has no RoPE-DHR positions" in refused.stderr


def test_a_trained_bundle_beside_its_source(export: Export) -> None:
    pair = export("qwen3_vl")
    report = validate_pair(pair.checkpoint.parent / "source", pair.bundle, steps=2)
    assert report.passed and [each.level.name for each in report.comparisons] == ["fp32", "tuned"]
    assert report.comparisons[0].state == "gates closed in memory"
    assert any("layers.1.pvm 0.8" in note for note in report.notes)
    assert any("the grafts were not judged" in note for note in report.notes)


def test_the_first_wrong_layer_of_a_bundle_is_named(export: Export, tmp_path: Path) -> None:
    pair = export("qwen3_vl")
    broken = damaged(pair.checkpoint, tmp_path / "broken", "layers.1.mlp.down_proj.weight")
    report = validate_pair(broken, pair.bundle, steps=STEPS)
    assert not report.passed
    assert all((c.first_wrong or "").startswith("hidden_states.1,") for c in report.comparisons[0].cases)


def test_a_changed_backbone_under_closed_gates_is_no_identity(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl")
    apply(source, tmp_path / "patched", "pvm:layers=1,latent=32")
    broken = damaged(tmp_path / "patched", tmp_path / "broken", "layers.2.self_attn.o_proj.weight")
    report = validate_pair(source, broken, steps=STEPS)
    assert report.comparisons[0].level.name == "identity" and not report.passed
    assert (report.comparisons[0].cases[0].first_wrong or "").startswith("hidden_states.2,")


# -- grafts behind closed gates -----------------------------------------------------------------------------------
def fresh(folder: Path, recipe: str, dtype: torch.dtype, model_type: str = "qwen3_vl") -> tuple[Path, Path]:
    """A fresh patch, its gates closed, and its bundle."""
    source = tiny_checkpoint(folder / "source", model_type, num_hidden_layers=2)
    apply(source, folder / "patched", recipe)
    export_bundle(folder / "patched", folder / "bundle", dtype=dtype, max_length=256, measure=False)
    return folder / "patched", folder / "bundle"


ASKED: dict[str, Any] = {"images": [CHART], "prompt": "What is this?", "steps": 2}


@pytest.mark.parametrize(
    ("recipe", "dtype"),
    # in fp16 the level itself would not notice how little a fresh mixin does
    [("pvm:layers=1,latent=32", torch.float32), ("mixin:layers=1", torch.float16)],
    ids=["pvm, fp32", "mixin, fp16"],
)
def test_a_fresh_grafts_keys_and_values_are_judged(
    recipe: str,
    dtype: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = validate_pair(*fresh(tmp_path / "right", recipe, dtype), **ASKED)
    assert report.passed, report.to_json()
    closed, opened = report.comparisons
    assert closed.state == "as they are" and opened.state == "gates opened in memory"
    assert any("gates are closed" in note and "opened to 2" in note for note in report.notes)

    project, trace = functions.project, tracing.trace

    def trace_changed(module: Any, *arguments: Any) -> Any:
        return (trace_afresh if isinstance(module, MemoryProjection) else trace)(module, *arguments)

    monkeypatch.setattr(tracing, "trace", trace_changed)  # the traces of others do not have it
    monkeypatch.setattr(functions, "project", lambda *arguments: tuple(reversed(project(*arguments))))
    wrong = validate_pair(*fresh(tmp_path / "wrong", recipe, dtype), **ASKED)
    closed, opened = wrong.comparisons
    assert closed.passed and opened.verdict == wrong.verdict == "failed"
    assert any("what the grafts change is off by" in failure for failure in opened.failures)
    report_validation(wrong)
    assert "FAILED: what the grafts change is off by" in capsys.readouterr().out


def test_what_rounding_hides_is_said_to_be_unjudged(tmp_path: Path) -> None:
    report = validate_pair(*fresh(tmp_path, "mixin:layers=1", torch.bfloat16), **ASKED)
    opened = report.comparisons[1]
    seen = [note for note in report.all_notes() if "of their size" in note]
    assert len(seen) == 1 and ("not judged" in seen[0]) == ("hides" in seen[0])
    assert not opened.failures


@pytest.fixture(scope="module")
def fresh_pvm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return fresh(tmp_path_factory.mktemp("fresh"), "pvm:layers=1,latent=32", torch.float32)


def test_opened_gates_reach_no_file_and_do_not_stay_open(fresh_pvm: tuple[Path, Path]) -> None:
    patched, bundle = fresh_pvm
    files = [*patched.glob("*.safetensors"), *bundle.rglob("*.safetensors"), *bundle.glob("*.onnx")]
    before = [file.read_bytes() for file in files]
    gate = "model.language_model.layers.1.pvm.alpha"
    prompts = own_case([CHART], "What is this?")[0].prompts
    for candidate in (TorchRunner(patched), BundleRunner(bundle)):
        assert candidate.gates() == {gate: 0.0}
        closed = candidate.trace(prompts, 1).step_logits
        with candidate.with_gates({gate: 2.0}):
            opened = candidate.trace(prompts, 1).step_logits
            layers = candidate.tensors(prompts)
        assert np.abs(opened - closed).max() > 0.1
        assert np.abs(layers["hidden_states.1"][0] - candidate.tensors(prompts)["hidden_states.1"][0]).max() > 0.1
        np.testing.assert_array_equal(candidate.trace(prompts, 1).step_logits, closed)
    assert before == [file.read_bytes() for file in files]


def test_a_gate_below_zero_is_as_open_as_one_above(fresh_pvm: tuple[Path, Path], tmp_path: Path) -> None:
    patched = Path(shutil.copytree(fresh_pvm[0], tmp_path / "patched"))
    set_gates(patched, -0.8)
    export_bundle(patched, tmp_path / "bundle", dtype=torch.float32, max_length=16, graphs=["decoder"])
    for candidate in (TorchRunner(patched), BundleRunner(tmp_path / "bundle")):
        assert candidate.gates() == {"model.language_model.layers.1.pvm.alpha": pytest.approx(0.8)}


def test_a_prompt_without_images_does_not_judge_grafts(fresh_pvm: tuple[Path, Path], tmp_path: Path) -> None:
    bundle, patched = fresh_pvm[1], Path(shutil.copytree(fresh_pvm[0], tmp_path / "patched"))
    report = validate_pair(patched, bundle, prompt="Hello!", steps=1)
    assert report.passed and "the grafts were not judged: no prompt has an image" in report.notes
    set_gates(patched, 0.8)  # the bundle's are closed: no prompt of text shows that
    report = validate_pair(patched, bundle, prompt="Hello!", steps=1)
    assert (
        report.verdict == "failed" and "pvm.alpha is 0.8 in the reference and 0 in the" in report.checks[-1].failures[0]
    )


# -- models that are not one --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_hidden_layers": 2}, "text num_hidden_layers 2 in one and 3 in"),
        ({"intermediate_size": 96}, "text intermediate_size 96 in one and 128 in"),
        ({"num_attention_heads": 8, "head_dim": 8}, "text num_attention_heads 8 in one and 4 in"),
        ({"num_key_value_heads": 4}, "text num_key_value_heads 4 in one and 2 in"),
        ({"head_dim": 32}, "text head_dim 32 in one and 16 in"),
        ({"vision": {"intermediate_size": 64}}, "vision intermediate_size 64 in one and 48 in"),
        ({"vision": {"deepstack_visual_indexes": [0, 2]}}, "deepstack_visual_indexes [0, 2] in one and [0, 1] in"),
    ],
    ids=["layers", "intermediate", "heads", "kv heads", "head_dim", "vision", "deepstack"],
)
def test_models_of_other_sizes_are_refused_in_one_line(
    export: Export, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    other = tiny_checkpoint(tmp_path / "other", "qwen3_vl", **{"num_hidden_layers": 3, **options})
    assert_refused(run("validate", export("qwen3_vl").bundle, other), "not forms of one model", message)
    assert_refused(run("validate", other, export("qwen3_vl").checkpoint), "not forms of one model", message)


def test_other_families_and_other_grafts_are_refused_in_one_line(export: Export, tmp_path: Path) -> None:
    pair = export("qwen3_vl")
    apply(pair.checkpoint.parent / "source", tmp_path / "mixin", *MIXIN)
    for other in (pair.checkpoint, pair.bundle):
        assert_refused(run("validate", tmp_path / "mixin", other), "grafts", "pvm at layers 1, 2", "mixin at layers 0")
    family = tiny_checkpoint(tmp_path / "family", "qwen2_5_vl", num_hidden_layers=3)
    assert_refused(run("validate", pair.bundle, family), "not forms of one model", "qwen2_5_vl", "qwen3_vl")


def test_tiles_in_another_order_are_refused_in_one_line(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "internvl", num_hidden_layers=1)
    apply(source, tmp_path / "rows", "rope-dhr")
    apply(source, tmp_path / "columns", "rope-dhr:tile_order=column")
    refused = run("validate", tmp_path / "rows", tmp_path / "columns")
    assert_refused(refused, "not forms of one model", "positions", "row", "column")


def test_other_prompts_fail_in_words(export: Export, tmp_path: Path) -> None:
    pair = export("qwen3_vl")
    other = Path(shutil.copytree(pair.checkpoint, tmp_path / "other"))
    settings = json.loads((other / "preprocessor_config.json").read_text())
    settings["size"] = {"longest_edge": 20000, "shortest_edge": 4096}
    (other / "preprocessor_config.json").write_text(json.dumps(settings))
    done = run("validate", pair.checkpoint, other, "--steps", 1, "--json")
    assert done.exit_code == 1, done.output
    judged = json.loads(done.stdout)["comparisons"][0]
    assert "the prompt becomes" in judged["cases"][0]["failures"][0] and judged["cases"][2]["failures"] == []


def test_the_command_exits_with_the_verdict_and_writes_the_report(export: Export, tmp_path: Path) -> None:
    pair, file = export("qwen3_vl"), tmp_path / "report.json"
    own = ("--prompt", "What is this?", "--steps", 3)
    result = run("validate", pair.checkpoint, pair.bundle, *own, "--report", file)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("passed") > 1 and "passed in" in result.stdout
    written = json.loads(file.read_text())
    assert written["passed"] is True and written["comparisons"][0]["cases"][0]["tokens_equal"] == 3

    again = run("validate", pair.checkpoint, pair.bundle, *own, "--report", file)
    assert again.exit_code == 2 and "--overwrite" in again.stderr

    broken = damaged(pair.checkpoint, tmp_path / "broken", "layers.0.mlp.down_proj.weight")
    failed = run("validate", broken, pair.bundle, *own, "--json")
    assert failed.exit_code == 1
    assert json.loads(failed.stdout)["passed"] is False

    nothing = run("validate", tmp_path / "nothing", pair.bundle)
    assert nothing.exit_code == 2 and nothing.stderr.startswith("error: ")
