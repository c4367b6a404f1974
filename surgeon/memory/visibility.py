"""Which tokens see an image in the memory.

`causal`: those that stand at or behind it in the sequence, as in self-attention. What a token computes then depends on
nothing that follows it, so a cache, a shared prefix and one pass over everything agree. `all`: every token of its
sample, those before the image too, as PVM and CoMemo were published.
"""

from typing import Any, Literal

import torch
from torch import Tensor

Visibility = Literal["causal", "all"]


def visibility_of(record: dict[str, Any]) -> Visibility:
    """That of a model's grafts, which read one memory. A graft recorded without it is from before there was a choice,
    when every token saw every image."""
    recorded: Visibility = "all"
    for entry in record.get("grafts", []):
        recorded = entry.get("visibility", "all")
    return recorded


def causally(mask: Tensor, memory_places: Tensor, token_places: Tensor) -> Tensor:
    """Which slots each token sees: of those in mask, bool [B, M] or [B, S, M], the ones that stand in the sequence at
    or before its own place. memory_places int64 [B, M], token_places int64 [S] or [B, S] -> bool [B, S, M]."""
    is_past = memory_places[:, None] <= torch.atleast_2d(token_places)[..., None]
    return is_past & (mask if mask.ndim == 3 else mask[:, None])
