"""Small short formers as if trained, and images for them, for tests."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from checkpoints import FAMILIES
from family_case import family_cases
from surgeon.families import Grid, family
from surgeon.memory.short_former import ShortFormer
from surgeon.memory.towers._base import ImageInputs, Tower

NUM_LATENTS, NUM_QUERIES = 3, 5
WITH_TOWER = tuple(model_type for model_type in FAMILIES if family(model_type).tower is not None)
"""The families that have a short former."""


def tower_of(model_type: str) -> type[Tower]:
    tower = family(model_type).tower
    assert tower is not None
    return tower


def tiny_former(model: PreTrainedModel, seed: int = 0, targets: Sequence[str] | None = None) -> ShortFormer:
    """A short former on a tiny model. Its adapters add about as much as their layers give."""
    tower = tower_of(model.config.model_type)
    former = ShortFormer(tower, model.model, NUM_LATENTS, targets, rank=4, alpha=4.0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in former.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise if parameter is former.memory_init else noise / parameter.shape[1] ** 0.5)
    return former.to(model.dtype)


def graft_former(model: PreTrainedModel, former: ShortFormer) -> ShortFormer:
    """The former as a module of the model, as it is in a patched one."""
    model.model.vismem = nn.Module()
    model.model.vismem.short = former
    return former


def tiny_queries(model: PreTrainedModel, seed: int = 0) -> Tensor:
    """[K, d] of the model's dtype."""
    width = model.config.get_text_config().hidden_size
    return torch.randn(NUM_QUERIES, width, generator=torch.Generator().manual_seed(seed)).to(model.dtype)


def square_images(model: PreTrainedModel, *sides: int) -> list[tuple[np.ndarray, Grid]]:
    """For each side one image of so many patches to a side, where the family has images of several sizes; all other
    than each other."""
    case = family_cases()[model.config.model_type]
    return [case.square_image(model.config, side) for side in sides]


def one_request(
    model: PreTrainedModel, images: Sequence[tuple[np.ndarray, Grid]], tokens: int | None = None
) -> tuple[dict[str, Any], list[ImageInputs]]:
    """The model's keywords for one row with these images, and what the tower makes of them. A lone image has another
    beside it in the row, for some families see it otherwise. `tokens`: visual tokens of each, where the family's file
    has another number."""
    whole_row = [*images, *images] if len(images) == 1 else images
    described, tower = family(model.config.model_type), tower_of(model.config.model_type)
    arrays = described.model_kwargs([[pixels for pixels, _ in whole_row]], [[grid for _, grid in whole_row]])
    kwargs = {name: torch.from_numpy(value) for name, value in arrays.items()}
    kwargs["pixel_values"] = kwargs["pixel_values"].to(model.dtype)
    row = [False]
    for _, grid in whole_row:
        row += [True] * (tokens or described.image_tokens(model.config, grid)) + [False] * 2
    return kwargs, tower.images_by_row(model.model, kwargs, torch.tensor([row]))[0][: len(images)]
