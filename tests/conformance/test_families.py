"""What every family must do, whichever it is: nothing here names one.

A family is found by its file in `surgeon/families`, and made small by its file in `tests/family_cases`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import passes
from checkpoints import FAMILIES, has_tokenizer, tiny_checkpoint, tiny_model
from command import run
from exporters.onnxruntime import BundleRuntime
from family_case import family_cases
from graft_case import graft_cases
from pairs import MIXIN, PVM, Pair, image
from patching import apply, randomise_grafts
from surgeon import models
from surgeon.families import Family, family, supported
from surgeon.inputs import Inputs, Prompt
from surgeon.live import graft_parameters
from surgeon.memory.decoder_layer import NORM_PLACEMENTS, check_parts
from surgeon.memory.graft import Graft
from surgeon.parity.cases import Case, default_cases
from surgeon.parity.processor import check_inputs

pytestmark = pytest.mark.skipif(not has_tokenizer(), reason="needs the demo checkpoint's tokenizer")
every_family = pytest.mark.parametrize("model_type", FAMILIES)
GRAFTS = MIXIN + PVM
OF_GRAFTS = {kind: case.recipe for kind, case in graft_cases().items()}
OF_PASSES = {name: OF_GRAFTS.get(name, name) for name in sorted(passes.registry())}
FOR_ALL = (*OF_GRAFTS.values(), "memory-tokens")
ROWS = [
    Prompt("What is it?", (image(96, 64),)),
    Prompt("A star is a"),
    Prompt("Compare them.", (image(64, 64, 1), image(130, 60, 2))),
]


def test_every_family_has_a_case() -> None:
    """A new family is one file in surgeon/families and one in tests/family_cases, both named by its model_type."""
    assert supported() == list(FAMILIES)


@pytest.fixture(scope="module")
def checkpoints(shared: Callable[..., Path]) -> Callable[[str], Path]:
    """A plain checkpoint of a family."""
    return lambda model_type: (
        shared(f"plain {model_type}", lambda path: tiny_checkpoint(path / "source", model_type, num_hidden_layers=3))
        / "source"
    )


@pytest.fixture(scope="module")
def model_of() -> Callable[[str], tuple[PreTrainedModel, Family]]:
    return lambda model_type: (tiny_model(model_type), family(model_type))


# -- prompts and images ------------------------------------------------------------------------------------------
@every_family
def test_prompts_and_pixels_are_the_processors(
    checkpoints: Callable[[str], Path], tmp_path: Path, model_type: str
) -> None:
    """transformers' own processor, whole: template, placeholders, pixels, kinds of token; before and after a patch."""
    pytest.importorskip("torchvision")
    apply(checkpoints(model_type), tmp_path / "patched", *MIXIN)
    cases = [*default_cases(), *(Case(prompt.text, (prompt,)) for prompt in ROWS)]
    for folder in (checkpoints(model_type), tmp_path / "patched"):
        compared_with, failures = check_inputs(Inputs.from_directory(folder), folder, cases)
        assert failures == [] and "transformers' own" in compared_with


@every_family
def test_positions_are_the_models_own(checkpoints: Callable[[str], Path], model_type: str) -> None:
    """Those that transformers' decoder turns its queries with, prefill and two tokens, rows of different lengths."""
    checkpoint = checkpoints(model_type)
    model, described = models.load(checkpoint), family(model_type)
    prepared = Inputs.from_directory(checkpoint).prepare(ROWS)
    turned: list[np.ndarray] = []

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        position_ids = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        turned.append(np.array(position_ids.numpy(), ndmin=3))

    model.get_submodule(described.text_model).rotary_emb.register_forward_pre_hook(note, with_kwargs=True)
    model.generate(**prepared.model_kwargs(), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    mask = prepared.attention_mask
    positions, following = described.position_ids(model.config, prepared.input_ids, mask, prepared.grids)
    assert positions.dtype == following.dtype == np.int64
    prefill, *steps = turned
    own = np.broadcast_to(mask == 1, positions.shape)
    np.testing.assert_array_equal(positions[own], np.broadcast_to(prefill, positions.shape)[own])
    for number, step in enumerate(steps):
        np.testing.assert_array_equal(step[:, :, 0], np.broadcast_to(following + number, step.shape[:2]))


@every_family
def test_frequencies_turn_with_the_axes_that_the_family_says(
    model_of: Callable[[str], tuple[PreTrainedModel, Family]], model_type: str
) -> None:
    """Every axis in turn: what changes when it alone changes is what the family says turns with it."""
    model, described = model_of(model_type)
    axes = described.rope_axes(model.config)
    rotary = model.get_submodule(described.text_model).rotary_emb
    count = max(axes) + 1
    base = torch.zeros((count, 1, 1) if count > 1 else (1, 1), dtype=torch.long)
    still = rotary(torch.zeros(1), base)[0].flatten()
    for axis in range(count):
        moved = base.clone()
        moved[axis] = 3000
        changed = rotary(torch.zeros(1), moved)[0].flatten() != still
        half = len(axes)
        assert changed[:half].tolist() == changed[half:].tolist() == [each == axis for each in axes]


# -- the vision tower --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("side", [19, 25, 29, 31])
@every_family
def test_the_vision_export_computes_get_image_features(model_type: str, side: int) -> None:
    """At sides where boundaries of position buckets, computed in fp32, are not those of the exact fractions."""
    case, described = family_cases()[model_type], family(model_type)
    side *= case.side_multiple
    model = tiny_model(model_type, vision=case.vision_of_side(side))
    pixels, grid = case.square_image(model.config, side)
    export = described.vision_export(model, torch.float32)
    outputs = dict(zip(export.output_names, run_export(export, described, model, pixels, grid), strict=True))
    expected = image_features(described, model, pixels, grid)
    assert expected.std() > 0.1
    assert len(outputs["features"]) == described.image_tokens(model.config, grid)
    torch.testing.assert_close(outputs["features"], expected, rtol=1e-4, atol=1e-5)


def run_export(export: Any, described: Family, model: Any, pixels: np.ndarray, grid: Any) -> tuple[torch.Tensor, ...]:
    inputs = described.vision_inputs(model.config, pixels, grid)
    tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()}
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        outputs: tuple[torch.Tensor, ...] = export.module(
            **{name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        )
    return outputs


def image_features(described: Family, model: Any, pixels: np.ndarray, grid: Any) -> torch.Tensor:
    """transformers' own of the first of two images, [M, d]; some families treat a lone one otherwise."""
    arrays = described.model_kwargs([[pixels, pixels]], [[grid, grid]])
    kwargs = {name: torch.from_numpy(value) for name, value in arrays.items()}
    kwargs["pixel_values"] = kwargs["pixel_values"].to(next(model.parameters()).dtype)
    with torch.no_grad():
        features = model.model.get_image_features(**kwargs).pooler_output
    features = torch.cat(list(features)) if isinstance(features, list | tuple) else features
    first, second = features.reshape(2, -1, features.shape[-1])
    torch.testing.assert_close(first, second)
    return first


@every_family
def test_the_vision_export_in_bf16_is_as_near_to_fp32_as_transformers(model_type: str) -> None:
    described, exact, low = family(model_type), tiny_model(model_type), tiny_model(model_type, torch.bfloat16)
    pixels, grid = family_cases()[model_type].square_image(exact.config, 6)
    reference = image_features(described, exact, pixels, grid)
    ours = run_export(described.vision_export(low, torch.bfloat16), described, low, pixels, grid)[0]
    theirs = image_features(described, low, pixels, grid)
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - reference).abs().mean() < 1.2 * (theirs.float() - reference).abs().mean()


@every_family
def test_the_vision_export_names_every_parameter(model_type: str) -> None:
    model, described = tiny_model(model_type), family(model_type)
    export = described.vision_export(model, torch.float32)
    whole = dict(model.named_parameters())
    for name, parameter in export.module.named_parameters():
        source = whole[export.parameters[name]]
        assert parameter.data_ptr() == source.data_ptr() and parameter.numel() == source.numel(), name
    assert dict(export.module.named_buffers()).keys() == export.constants.keys()


# -- grafts ------------------------------------------------------------------------------------------------------
@every_family
def test_the_norm_placement_is_declared_and_is_the_layers(
    model_of: Callable[[str], tuple[PreTrainedModel, Family]], model_type: str
) -> None:
    model, described = model_of(model_type)
    assert "norm_placement" in {name for cls in type(described).__mro__ for name in vars(cls)}
    assert described.norm_placement in NORM_PLACEMENTS
    for layer in model.get_submodule(described.text_model).layers:
        check_parts(layer, described.norm_placement)


@pytest.mark.parametrize("recipe", OF_PASSES.values(), ids=OF_PASSES)
@every_family
def test_a_pass_changes_no_logit(
    checkpoints: Callable[[str], Path], tmp_path: Path, model_type: str, recipe: str
) -> None:
    """Just inserted; of one that moves positions, with plain ones asked for. What a family cannot have is one line."""
    source, out = checkpoints(model_type), tmp_path / "out"
    result = run("patch", source, out, "--pass", recipe)
    if recipe not in (*FOR_ALL, *family_cases()[model_type].prompt_passes):
        assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1 and not out.exists()
        return
    assert result.exit_code == 0, result.stderr
    positions: Any = "plain" if recipe == "rope-dhr" else None
    kwargs = Inputs.from_directory(out).prepare(ROWS, positions=positions).model_kwargs()
    expected = Inputs.from_directory(source).prepare(ROWS).model_kwargs()
    with torch.no_grad():
        logits, source_logits = models.load(out)(**kwargs).logits, models.load(source)(**expected).logits
    added = list((json.loads((out / "config.json").read_text())["surgeon"].get("tokens") or {}).values())
    known = [token for token in range(source_logits.shape[-1]) if token not in added]
    assert torch.equal(logits[..., known], source_logits[..., known])


@every_family
def test_a_training_step_changes_the_grafts_and_nothing_else(
    checkpoints: Callable[[str], Path], tmp_path: Path, model_type: str
) -> None:
    apply(checkpoints(model_type), tmp_path / "out", *GRAFTS)
    model: Any = models.load(tmp_path / "out")
    randomise_grafts(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    own = {id(parameter) for _, parameter in graft_parameters(model)}
    optimiser = torch.optim.SGD([p for p in model.parameters() if id(p) in own], lr=0.1)
    kwargs = Inputs.from_directory(tmp_path / "out").prepare(ROWS).model_kwargs()
    model(**kwargs, labels=kwargs["input_ids"]).loss.backward()
    optimiser.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != (id(parameter) in own), name


@every_family
def test_a_bundle_computes_what_its_checkpoint_does(export: Callable[..., Pair], model_type: str) -> None:
    """Logits and greedy tokens, with grafts as if trained: rows with one image, with none and with two."""
    pair = export(model_type, GRAFTS)
    runtime = BundleRuntime(pair.bundle, threads=1)
    state, logits = runtime.start(runtime.prepare(ROWS))
    step_logits = [logits]
    while len(step_logits) < 16:
        step_logits.append(runtime.step(state, step_logits[-1].argmax(-1)))
    tokens, expected = pair.greedy(pair.inputs.prepare(ROWS), len(step_logits))
    np.testing.assert_allclose(np.stack(step_logits, axis=1), expected, atol=1e-4, rtol=0)
    assert np.stack(step_logits, axis=1).argmax(-1).tolist() == tokens.tolist()


@every_family
def test_validate_passes_a_bundle_and_fails_another_models(
    export: Callable[..., Pair], tmp_path: Path, model_type: str
) -> None:
    pair = export(model_type, GRAFTS)
    asked = ("--prompt", "What is it?", "--image", family_image(), "--steps", 2)
    done = run("validate", pair.checkpoint, pair.bundle, *asked)
    assert done.exit_code == 0 and "passed" in done.stdout, done.output
    other = tiny_checkpoint(tmp_path / "other", model_type, seed=1, num_hidden_layers=3)
    assert run("validate", other, pair.bundle, *asked).exit_code == 1


def family_image() -> Path:
    return Path(__file__).resolve().parents[2] / "examples" / "demo" / "images" / "red-triangle-green-circle.png"


def test_grafts_are_all_of_the_grafts(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """`graft_parameters`, which the training step above rests on."""
    apply(checkpoints("qwen3_vl"), tmp_path / "out", *GRAFTS)
    model: Any = models.load(tmp_path / "out")
    expected = [p for module in model.modules() if isinstance(module, Graft) for p in module.parameters()]
    assert {id(p) for _, p in graft_parameters(model)} == {id(p) for p in expected}
