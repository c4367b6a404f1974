"""A later turn of a conversation whose earlier turns are in the cache: only new images enter."""

from itertools import groupby
from typing import Any

import torch
from torch import Tensor


def drop_cached_images(model: Any, input_ids: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords of `generate` for a whole conversation, without the images that its cache already holds.

    `input_ids [B, S]` and `kwargs` are what the processor gives for the whole conversation, all images included, with
    `past_key_values` beside them. Positions depend on every image, so they are computed before any is dropped.
    Raises ValueError where images and their placeholders do not match.
    """
    past_length = kwargs["past_key_values"].get_seq_length()
    if past_length and kwargs.get("pixel_values_videos") is not None:
        raise ValueError("a later turn with a video is not supported; pass no past_key_values")
    pixel_values = kwargs.get("pixel_values")
    if past_length == 0 or pixel_values is None:
        return kwargs
    if kwargs.get("image_sizes") is not None:
        raise ValueError(
            "a later turn with images is not supported for this family, whose images change their form "
            "when another joins them; pass no past_key_values"
        )
    if kwargs.get("memory_embeds") is not None:
        raise ValueError("a later turn is not supported where tiles go to the memory alone; pass no past_key_values")
    runs = visual_runs(model.base_model.visual_token_mask(input_ids, None))
    new = torch.tensor([start >= past_length for start, _ in runs], device=pixel_values.device)
    # images bring as many rows of pixel_values, patches or tiles, for each of their tokens
    rows, tokens = len(pixel_values), sum(length for _, length in runs)
    if not runs or rows * runs[0][1] % tokens:
        raise ValueError(
            f"the conversation has {tokens} visual tokens and pixel_values {rows} rows; with a cache, pass the "
            "images of the whole conversation, earlier turns included"
        )
    kwargs = dict(kwargs)
    grids = kwargs.get("image_grid_thw")
    if grids is not None:
        if len(runs) != len(grids):
            raise ValueError(
                f"the conversation has {len(runs)} images and {len(grids)} grids were passed; with a cache, pass the "
                "images of the whole conversation, earlier turns included"
            )
        if kwargs.get("position_ids") is None:
            # without the cache: beside one, transformers may go on from the offset left by the model's last pass, which
            # knows no new image and may be another conversation's
            whole_prompt = {name: value for name, value in kwargs.items() if name != "past_key_values"}
            whole_prompt["input_ids"] = input_ids
            kwargs["position_ids"] = model._prepare_position_ids_for_generation(input_ids, whole_prompt)
        kwargs["image_grid_thw"] = grids[new.to(grids.device)] if bool(new.any()) else None
    parts = pixel_values.split([rows * length // tokens for _, length in runs])
    new_parts = [part for part, is_new in zip(parts, new.tolist(), strict=True) if is_new]
    kwargs["pixel_values"] = torch.cat(new_parts) if new_parts else None
    return {name: value for name, value in kwargs.items() if value is not None}


def visual_runs(visual_token_mask: Tensor) -> list[tuple[int, int]]:
    """Start and length of each run of visual tokens in its row, row after row. visual_token_mask bool [B, S]."""
    runs = []
    for row in visual_token_mask.tolist():
        position = 0
        for visual, run in groupby(row):
            length = len(list(run))
            runs += [(position, length)] if visual else []
            position += length
    return runs
