"""A later turn of a conversation whose earlier turns are in the cache: only new pictures enter."""

from itertools import groupby
from typing import Any

import torch
from torch import Tensor


def drop_cached_pictures(model: Any, input_ids: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords of `generate` for a whole conversation, without the pictures that its cache already holds.

    `input_ids [B, S]` and `kwargs` are what the processor gives for the whole conversation, all pictures included, with
    `past_key_values` beside them. Positions depend on every picture, so they are computed before any is dropped.
    Raises ValueError where pictures and their placeholders do not match.
    """
    past_length = kwargs["past_key_values"].get_seq_length()
    grids = kwargs.get("image_grid_thw")
    if past_length == 0 or grids is None or kwargs.get("pixel_values") is None:
        return kwargs
    runs = picture_starts(model.visual_token_mask(input_ids, None))
    if len(runs) != len(grids):
        raise ValueError(
            f"the conversation has {len(runs)} pictures and {len(grids)} grids were passed; with a cache, pass the "
            "pictures of the whole conversation, earlier turns included"
        )
    kwargs = dict(kwargs)
    if kwargs.get("position_ids") is None:
        known = {**kwargs, "input_ids": input_ids}
        kwargs["position_ids"] = model._prepare_position_ids_for_generation(input_ids, known)
    new = torch.tensor([start >= past_length for start in runs])
    patches = kwargs["pixel_values"].split(grids.prod(-1).tolist())
    kept = [patch for patch, is_new in zip(patches, new.tolist(), strict=True) if is_new]
    if kept:
        kwargs["pixel_values"], kwargs["image_grid_thw"] = torch.cat(kept), grids[new.to(grids.device)]
    else:
        del kwargs["pixel_values"], kwargs["image_grid_thw"]
    return kwargs


def picture_starts(visual_token_mask: Tensor) -> list[int]:
    """Where each picture's run of visual tokens starts in its row, row after row. visual_token_mask bool [B, S]."""
    starts = []
    for row in visual_token_mask.tolist():
        position = 0
        for visual, run in groupby(row):
            starts += [position] if visual else []
            position += len(list(run))
    return starts
