"""The visual memory of one request: keys and values of every graft, computed once when a picture enters.

It is a layer of the request's KV cache, so whatever is done to the cache (beams reordered, rows repeated or selected,
moved, dropped) is done to the memory, and no module holds any of it.
"""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


class VisualMemory(CacheLayerMixin):
    """Keys and values `[B, Hm, M, hd]` by entry (`<layer>.<kind>`), and which of the M slots a row uses."""

    is_compileable = True
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.entries: dict[str, tuple[Tensor, Tensor]] = {}
        self.mask: Tensor | None = None  # bool [B, M]

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

    def extend(self, entries: dict[str, tuple[Tensor, Tensor]], mask: Tensor) -> None:
        """Append the slots of new pictures: `entries` keys and values [B, Hm, M', hd], mask bool [B, M']."""
        if self.mask is None:
            self.entries, self.mask = dict(entries), mask
        else:
            self.entries = {
                name: (torch.cat((self.entries[name][0], keys), 2), torch.cat((self.entries[name][1], values), 2))
                for name, (keys, values) in entries.items()
            }
            self.mask = torch.cat((self.mask, mask), 1)
        self.is_initialized = True

    # -- what a cache does to its layers -----------------------------------------------------------------------
    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.mask is not None:
            self.entries = {n: (k[indices.to(k.device)], v[indices.to(v.device)]) for n, (k, v) in self.entries.items()}
            self.mask = self.mask[indices.to(self.mask.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.mask is not None:
            self.entries = {
                n: (k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0))
                for n, (k, v) in self.entries.items()
            }
            self.mask = self.mask.repeat_interleave(repeats, 0)

    def reset(self) -> None:
        self.entries, self.mask, self.is_initialized = {}, None, False

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


def gather_rows(inputs_embeds: Tensor, visual_token_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's visual embeddings, in order, padded with zeros to the longest row.

    inputs_embeds [B, S, d], visual_token_mask bool [B, S] -> visual_embeds [B, M, d], mask bool [B, M].
    """
    counts = visual_token_mask.sum(1)
    mask = torch.arange(int(counts.max()), device=counts.device) < counts[:, None]
    rows = inputs_embeds[visual_token_mask].split(counts.tolist())
    padded = [F.pad(row, (0, 0, 0, mask.shape[1] - row.shape[0])) for row in rows]
    return torch.stack(padded), mask
