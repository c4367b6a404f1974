"""The visual memory of one request: keys and values of every graft, computed once when an image enters.

It is a layer of the request's KV cache, so whatever is done to the cache (beams reordered, rows repeated or selected,
cropped, moved, dropped) is done to the memory, and no module holds any of it.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from surgeon.memory.slots import Slots

Entries = dict[str, tuple[Tensor, Tensor]]
"""Keys and values `[B, Hm, M, hd]` by entry (`<layer>.<kind>`)."""


class VisualMemory(CacheLayerMixin):
    """Keys and values of every entry, the slots that they fill, and what else of a request outlives a call."""

    is_compileable = True
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self._forget()

    def _forget(self) -> None:
        self.entries: Entries = {}
        self.slots: Slots | None = None
        self.length: int | Tensor = 0  # tokens in the cache that it travels with
        self.next_position: Tensor | None = None  # int64 [B], where positions are not counted from the cache's length
        self.position_spans: list[tuple[int | Tensor, Tensor]] = []  # calls of several tokens: place, int64 [B, S]
        self.is_initialized = False

    @classmethod
    def of(cls, cache: Cache, num_hidden_layers: int) -> Self:
        """The memory that travels with `cache`; if it has none, one is appended behind the decoder's layers."""
        for layer in cache.layers[num_hidden_layers:]:
            if isinstance(layer, cls):
                return layer
        while len(cache.layers) < num_hidden_layers:  # a cache that grows with use: its own layers come first
            assert cache.layer_class_to_replicate is not None
            cache.layers.append(cache.layer_class_to_replicate())
        memory = cls()
        cache.layers.append(memory)
        return memory

    @property
    def mask(self) -> Tensor | None:
        """Which slots a row uses, bool [B, M]; None before the first image."""
        return None if self.slots is None else self.slots.mask

    def keep(self, entries: Entries, slots: Slots) -> None:
        """What the memory holds from now on: keys and values [B, Hm, M, hd] of every entry, in these slots."""
        self.entries, self.slots = entries, slots
        self.is_initialized = True

    def continue_positions(self, position_ids: Tensor, place: int | Tensor) -> None:
        """Tokens with these ids, int64 [B, S], were fed, the first at `place` of the cache; padding's ids are 0."""
        if position_ids.shape[1] > 1:
            self.position_spans.append((place, position_ids))
        self.next_position = position_ids.max(-1).values + 1

    def following_positions(self, length: int) -> Tensor | None:
        """The positions of the next `length` tokens, [B, S]; None where they are counted from the cache's length."""
        if self.next_position is None:
            return None
        return self.next_position[:, None] + torch.arange(length, device=self.next_position.device)

    # -- what a cache does to its layers -----------------------------------------------------------------------
    def _each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch to everything."""
        self.entries = {name: (change(keys), change(values)) for name, (keys, values) in self.entries.items()}
        self.slots = None if self.slots is None else self.slots.each_row(change)
        self.next_position = None if self.next_position is None else change(self.next_position)
        self.position_spans = [(place, change(ids)) for place, ids in self.position_spans]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each_row(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each_row(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def reset(self) -> None:
        self._forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget what stands in the last tokens: as many as the negative number says, or (older releases of
        transformers) all behind the first ones."""
        new_length = self.length + tokens_to_remove if tokens_to_remove <= 0 else min(self.length, tokens_to_remove)
        if self.slots is not None:
            slots = self.slots.before(new_length)
            if bool(slots.mask.any()):
                self.slots = slots
            else:
                self.entries, self.slots = {}, None
        self.length = new_length
        if self.next_position is not None:
            self._crop_positions(new_length)

    def _crop_positions(self, new_length: int | Tensor) -> None:
        """Tokens fed one by one count on from the last call of several."""
        while self.position_spans and self.position_spans[-1][0] >= new_length:
            self.position_spans.pop()
        if not self.position_spans:
            self.next_position = None
            return
        place, ids = self.position_spans[-1]
        remaining = int(new_length - place)
        one_by_one = max(0, remaining - ids.shape[1])
        self.next_position = ids[:, :remaining].max(-1).values + 1 + one_by_one

    def offload(self) -> None:
        """Read by several decoder layers, and small: it stays where it is."""

    def prefetch(self) -> None:
        """See `offload`."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate: `keep` brings the tensors."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise TypeError("the visual memory has no tokens of its own; use keep()")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1
