"""Families with several position axes: the forms in which positions reach the grafts that turn with them."""

from pathlib import Path

import pytest
import torch

from checkpoints import QWEN_TYPES, tiny_checkpoint
from patching import apply, batch, image, randomise_grafts
from surgeon import models

GRID = (1, 4, 6)


@pytest.mark.parametrize("model_type", QWEN_TYPES)
@torch.no_grad()
def test_the_texts_own_positions_in_front_are_no_axis(model_type: str, tmp_path: Path) -> None:
    """transformers hands the decoder [4, B, S] while it generates, the text's positions first, and else [3, B, S]."""
    apply(tiny_checkpoint(tmp_path / "source", model_type), tmp_path / "patched", "mixin:every=2")
    model = models.load(tmp_path / "patched")
    randomise_grafts(model)
    image_token_id = model.config.image_token_id
    row = [5, 6, *image(GRID), 7, 8]
    kwargs = batch(model, [[image_token_id if token == row[3] else token for token in row]], [GRID])
    kwargs["mm_token_type_ids"] = (kwargs["input_ids"] == image_token_id).long()
    axes, _ = model.model.get_rope_index(
        kwargs["input_ids"],
        image_grid_thw=kwargs["image_grid_thw"],
        mm_token_type_ids=kwargs["mm_token_type_ids"],
        attention_mask=kwargs["attention_mask"],
    )
    assert axes.shape[0] == 3 and not torch.equal(axes[1], axes[2])
    text = torch.arange(axes.shape[2]).expand(1, axes.shape[1], -1)
    expected = model(**kwargs, position_ids=axes).logits
    assert torch.equal(model(**kwargs, position_ids=torch.cat((text, axes))).logits, expected)
    assert torch.equal(model(**kwargs).logits, expected)
