"""The visual memory of one request: keys and values of every graft, computed once when a picture enters.

It is a layer of the request's KV cache, so whatever is done to the cache (beams reordered, rows repeated or selected,
moved, dropped) is done to the memory, and no module holds any of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from surgeon.memory.rotary import Rotary

Entries = dict[str, tuple[Tensor, Tensor]]
"""Keys and values `[B, Hm, M, hd]` by entry (`<layer>.<kind>`)."""


@dataclass(frozen=True)
class Reading:
    """What the grafts read in one call of the decoder."""

    entries: Entries
    mask: Tensor
    """bool [B, M], or [B, S, M] where tokens of a row see different pictures."""
    visual_token_mask: Tensor | None
    """bool [B, S], True at visual tokens."""
    rotary: dict[str, Rotary]
    """The angles of the tokens' positions, by kind of graft, for those that have a `rope`."""


class VisualMemory(CacheLayerMixin):
    """Keys and values of every entry, which of the M slots a row uses, and what else of a request outlives a call."""

    is_compileable = True
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.entries: Entries = {}
        self.mask: Tensor | None = None  # bool [B, M]
        self.sample_ids: Tensor | None = None  # int64 [B, M], where several samples are packed into a row
        self.next_position: Tensor | None = None  # int64 [B], where positions are not counted from the cache's length

    @classmethod
    def of(cls, cache: Cache, num_hidden_layers: int) -> Self:
        """The memory that travels with `cache`, which is given one, behind the decoder's layers, if it has none."""
        for layer in cache.layers[num_hidden_layers:]:
            if isinstance(layer, cls):
                return layer
        while len(cache.layers) < num_hidden_layers:  # a cache that grows with use: its own layers come first
            assert cache.layer_class_to_replicate is not None
            cache.layers.append(cache.layer_class_to_replicate())
        memory = cls()
        cache.layers.append(memory)
        return memory

    def extend(self, entries: Entries, mask: Tensor, sample_ids: Tensor | None = None) -> None:
        """Append the slots of new pictures: `entries` keys and values [B, Hm, M', hd], mask bool [B, M'], and for rows
        with several samples the sample of each slot [B, M']."""
        if self.mask is None:
            # read at every step, so they lie in order
            self.entries = {name: (keys.contiguous(), values.contiguous()) for name, (keys, values) in entries.items()}
            self.mask, self.sample_ids = mask, sample_ids
        else:
            self.entries = {
                name: (torch.cat((self.entries[name][0], keys), 2), torch.cat((self.entries[name][1], values), 2))
                for name, (keys, values) in entries.items()
            }
            self.mask = torch.cat((self.mask, mask), 1)
            if self.sample_ids is not None and sample_ids is not None:
                self.sample_ids = torch.cat((self.sample_ids, sample_ids), 1)
        self.is_initialized = True

    def seen_by(self, sample_ids: Tensor | None) -> Tensor:
        """Which slots each token sees: bool [B, M], or with the tokens' samples [B, S] bool [B, S, M]."""
        assert self.mask is not None
        if sample_ids is None or self.sample_ids is None:
            return self.mask
        return self.mask[:, None] & (sample_ids[:, :, None] == self.sample_ids[:, None])

    # -- what a cache does to its layers -----------------------------------------------------------------------
    def _each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch to everything."""
        self.entries = {name: (change(keys), change(values)) for name, (keys, values) in self.entries.items()}
        self.mask = None if self.mask is None else change(self.mask)
        self.sample_ids = None if self.sample_ids is None else change(self.sample_ids)
        self.next_position = None if self.next_position is None else change(self.next_position)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each_row(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each_row(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def reset(self) -> None:
        self.entries, self.mask, self.sample_ids, self.next_position = {}, None, None, None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Generated tokens are cropped, pictures are not: nothing to do."""

    def offload(self) -> None:
        """Read by several decoder layers, and small: it stays where it is."""

    def prefetch(self) -> None:
        """See `offload`."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate: `extend` brings the tensors."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise TypeError("the visual memory has no tokens of its own; use extend()")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


def gather_rows(x: Tensor, mask: Tensor) -> Tensor:
    """Each row's masked elements, in order, padded with zeros to the longest row. x [B, S, ...], mask bool [B, S]
    -> [B, M, ...]."""
    counts = mask.sum(1)
    longest = int(counts.max())
    rows = x[mask].split(counts.tolist())
    return torch.stack([F.pad(row, (0, 0) * (x.ndim - 2) + (0, longest - row.shape[0])) for row in rows])


def filled(mask: Tensor) -> Tensor:
    """Which slots `gather_rows` fills: mask bool [B, S] -> bool [B, M]."""
    counts = mask.sum(1)
    return torch.arange(int(counts.max()), device=mask.device) < counts[:, None]
