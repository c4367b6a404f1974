"""PEFT's adapters on a patched model: used where they are active, and nowhere else."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from checkpoints import QWEN_TYPES, tiny_model
from patching import apply, batch, image, open_gates, patched_pair, randomise_grafts
from surgeon import models

GRID = (1, 4, 6)
GRAFT_PROJECTIONS = ["text_proj", "visual_proj", "pvm.k_proj", "pvm.v_proj", "pvm.q_proj", "pvm.down_proj"]


@pytest.fixture(params=QWEN_TYPES)
def patched(request: pytest.FixtureRequest, tmp_path: Path) -> PreTrainedModel:
    model = patched_pair(tmp_path, request.param)[1]
    open_gates(model)
    return model


@torch.no_grad()
def logits_of(model: PreTrainedModel | PeftModel) -> torch.Tensor:
    return model(**batch(model, [[5, *image(GRID), 7, 8]], [GRID])).logits


def adapter(seed: int) -> LoraConfig:
    """Its matrices are drawn at once, as if it had been trained."""
    torch.manual_seed(seed)
    return LoraConfig(r=4, target_modules=GRAFT_PROJECTIONS, init_lora_weights=False)


def test_an_adapter_that_is_disabled_changes_nothing(patched: PreTrainedModel) -> None:
    """A reference model in preference training is the tuned one with its adapters disabled."""
    before = logits_of(patched)
    tuned = get_peft_model(patched, adapter(0))
    after = logits_of(tuned)
    assert (after - before).abs().max() > 0.01
    with tuned.disable_adapter():
        assert torch.equal(logits_of(tuned), before)
    assert torch.equal(logits_of(tuned), after)


def test_one_of_two_adapters_is_active(patched: PreTrainedModel) -> None:
    tuned = get_peft_model(patched, adapter(0), "first")
    first = logits_of(tuned)
    tuned.add_adapter("second", adapter(1))
    tuned.set_adapter("second")
    second = logits_of(tuned)
    assert (first - second).abs().max() > 0.01
    tuned.set_adapter("first")
    assert torch.equal(logits_of(tuned), first)
    tuned.merge_adapter(["first"])  # in place: what was added to the weight is not added again
    torch.testing.assert_close(logits_of(tuned), first, atol=1e-4, rtol=0)
    tuned.unmerge_adapter()
    torch.testing.assert_close(logits_of(tuned), first, atol=1e-4, rtol=0)


def test_whole_grafts_trained_beside_an_adapter_are_called(patched: PreTrainedModel) -> None:
    """PEFT puts a module of its own in the place of each one that it saves whole."""
    before = logits_of(patched)
    tuned = get_peft_model(patched, LoraConfig(r=4, target_modules=r".*self_attn\.q_proj", modules_to_save=["pvm"]))
    assert torch.equal(logits_of(tuned), before)
    tuned(**batch(patched, [[5, *image(GRID), 7, 8]], [GRID])).logits.square().mean().backward()
    graft = {name: p for name, p in tuned.named_parameters() if ".pvm." in name and p.requires_grad}
    assert graft
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in graft.values())
    with torch.no_grad():
        for name, parameter in graft.items():
            if name.endswith("alpha"):
                parameter.zero_()
    assert (logits_of(tuned) - before).abs().max() > 0.01


@pytest.mark.parametrize("part", ["graft", "layer"])
def test_a_graft_or_layer_that_something_wraps_is_called(part: str, tmp_path: Path) -> None:
    """As torch.compile does, or FSDP: the wrapper hands on attributes, and is no `Graft`."""
    tiny_model("internvl").save_pretrained(tmp_path / "source")
    apply(tmp_path / "source", tmp_path / "patched", "mixin:every=2")
    model = models.load(tmp_path / "patched")
    randomise_grafts(model)
    ids = torch.tensor([[5, *[model.config.image_token_id] * 9, 7, 8]])
    pixels = torch.randn(1, 3, 42, 42, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(input_ids=ids, pixel_values=pixels).logits
        layers = model.model.language_model.layers
        for index, layer in enumerate(layers):
            if part == "layer":
                layers[index] = torch.compile(layer, backend="eager")
            elif hasattr(layer, "mixin"):
                layer.mixin = torch.compile(layer.mixin, backend="eager")
        torch.testing.assert_close(model(input_ids=ids, pixel_values=pixels).logits, before, atol=1e-5, rtol=0)
