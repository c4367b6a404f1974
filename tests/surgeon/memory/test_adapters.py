"""PEFT's adapters on a patched model: used where they are active, and nowhere else."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from checkpoints import MODEL_TYPES
from patching import batch, open_gates, patched_pair, picture

GRID = (1, 4, 6)
GRAFT_PROJECTIONS = ["text_proj", "visual_proj", "pvm.k_proj", "pvm.v_proj", "pvm.q_proj", "pvm.down_proj"]


@pytest.fixture(params=MODEL_TYPES)
def patched(request: pytest.FixtureRequest, tmp_path: Path) -> PreTrainedModel:
    model = patched_pair(tmp_path, request.param)[1]
    open_gates(model)
    return model


@torch.no_grad()
def logits_of(model: PreTrainedModel | PeftModel) -> torch.Tensor:
    return model(**batch(model, [[5, *picture(GRID), 7, 8]], [GRID])).logits


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
