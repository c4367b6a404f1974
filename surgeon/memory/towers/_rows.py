"""Which images of a batch belong to which of its rows."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def by_row(images: Sequence[Any], tokens: Sequence[int], visual_token_mask: Tensor) -> list[list[Any]]:
    """Each row's images, in their order. tokens: how many visual tokens each image has; visual_token_mask bool [B, S].

    Raises ValueError where a row's visual tokens are not those of whole images.
    """
    per_row = visual_token_mask.sum(1).tolist()
    rows, start = [], 0
    for count in per_row:
        end = start
        while end < len(tokens) and sum(tokens[start:end]) < count:
            end += 1
        if sum(tokens[start:end]) != count:
            raise ValueError(f"images of {list(tokens)} visual tokens do not fit rows that have {per_row}")
        rows.append(list(images[start:end]))
        start = end
    if start != len(images):
        raise ValueError(f"images of {list(tokens)} visual tokens do not fit rows that have {per_row}")
    return rows


def refuse_videos(kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError where a call brings videos, whose tokens cannot be told from images'."""
    if kwargs.get("pixel_values_videos") is not None:
        raise ValueError("short memory of a request with videos is not supported: pass their frames as images")
