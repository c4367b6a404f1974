"""What a request remembers so that memory can be formed: what it has seen, what was said lately, what was formed.

It is a layer of the request's KV cache, as the visual memory is: whatever is done to the cache is done to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from surgeon.memory.memory_tokens import Kind
from surgeon.memory.towers._base import ImageInputs

_PIECES = 64


@dataclass(frozen=True)
class Invocation:
    """One call for memory in one row."""

    place: int
    """Of the invoke token, counted as the columns of the KV cache are."""
    kind: Kind
    latents: Tensor
    """[N, d]."""
    seconds: float
    """That forming them took."""


class InvokedMemory(CacheLayerMixin):
    """Of every row: hidden states of its images and of its latest text, its images, and its invocations."""

    is_compileable = False  # which row calls for memory is known on the host
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self._forget()

    def _forget(self) -> None:
        self.length = 0  # columns so far
        self.images: list[tuple[ImageInputs, ...]] = []
        self.image_places: list[tuple[int, ...]] = []  # the first column of the call that brought each
        self.invocations: list[tuple[Invocation, ...]] = []
        self.visual_states: Tensor | None = None  # [B, V, d]
        self.visual_places: Tensor | None = None  # int64 [B, V], -1 where a row has no more
        self.recent: list[Tensor] = []  # [B, s, d] each, the latest columns
        self.recent_is_text: list[Tensor] = []  # bool [B, s] each
        self.recent_columns: list[Tensor] = []  # int64 [s] each: which they are, counted as the cache's are
        self.is_initialized = False

    @classmethod
    def taken_from(cls, cache: Cache | None) -> Self:
        """That of a cache, out of it while a call runs; a new one where there is none."""
        for layer in [] if cache is None else cache.layers:
            if isinstance(layer, cls):
                assert cache is not None
                cache.layers.remove(layer)
                return layer
        return cls()

    @classmethod
    def of(cls, cache: Cache) -> Self | None:
        """That of a cache."""
        return next((layer for layer in cache.layers if isinstance(layer, cls)), None)

    def begin(self, batch_size: int) -> None:
        """A call of so many rows begins. Raises ValueError where the request has another number."""
        if not self.is_initialized:
            self.images, self.invocations = [()] * batch_size, [()] * batch_size
            self.image_places = [()] * batch_size
            self.is_initialized = True
        if len(self.images) != batch_size:
            raise ValueError(f"the cache is of {len(self.images)} rows and the call of {batch_size}")

    def add(self, hidden_states: Tensor, is_text: Tensor, is_visual: Tensor | None, window: int) -> None:
        """The columns of a call are over: hidden_states [B, S, d]; is_text, is_visual bool [B, S]. Of every row's text
        the last `window` tokens are kept."""
        if is_visual is not None:
            places = torch.arange(is_visual.shape[1], device=is_visual.device) + self.length
            self._add_visual(*rows_of(hidden_states, is_visual, places))
        length = hidden_states.shape[1]
        self.recent.append(hidden_states)
        self.recent_is_text.append(is_text)
        self.recent_columns.append(torch.arange(self.length, self.length + length, device=hidden_states.device))
        self.length += length
        if length > 1 or len(self.recent) > _PIECES:
            self._join()
            self._keep_columns(needed(self.recent_is_text[0], window))

    def _add_visual(self, states: Tensor, places: Tensor) -> None:
        if self.visual_states is not None and self.visual_places is not None:
            states = torch.cat((self.visual_states, states), 1)
            places = torch.cat((self.visual_places, places), 1)
        self.visual_states, self.visual_places = states, places

    def _join(self) -> None:
        if len(self.recent) > 1:
            self.recent = [torch.cat(self.recent, 1)]
            self.recent_is_text = [torch.cat(self.recent_is_text, 1)]
            self.recent_columns = [torch.cat(self.recent_columns)]

    def _keep_columns(self, kept: Tensor) -> None:
        """Of the one piece that there is, the columns in kept, bool [s]."""
        self.recent, self.recent_is_text = [self.recent[0][:, kept]], [self.recent_is_text[0][:, kept]]
        self.recent_columns = [self.recent_columns[0][kept]]

    def hide(self, padding: Tensor) -> None:
        """Columns that turned out to be padding, bool [B, length]: they are no text, and no image's."""
        self._join()
        if self.recent:
            hidden = padding[:, self.recent_columns[0].to(padding.device)]
            self.recent_is_text = [self.recent_is_text[0] & ~hidden.to(self.recent_is_text[0].device)]
        if self.visual_places is not None:
            hidden = padding.to(self.visual_places.device).gather(1, self.visual_places.clamp(min=0))
            self.visual_places = torch.where(hidden, -1, self.visual_places)

    def seen(self, row: int) -> list[Tensor]:
        """Hidden states of a row's images, [V, d], or nothing."""
        if self.visual_states is None or self.visual_places is None:
            return []
        return [self.visual_states[row, self.visual_places[row] >= 0]]

    def said(self, row: int, since: int) -> list[Tensor]:
        """Hidden states of a row's text from the column `since` on, as far as they are kept, [T, d] or nothing."""
        self._join()
        if not self.recent:
            return []
        return [self.recent[0][row, self.recent_is_text[0][row] & (self.recent_columns[0] >= since)]]

    # -- what a cache does to its layers -----------------------------------------------------------------------
    def _select(self, rows: Tensor) -> None:
        """Rows int64 [B'] of the request, in their order, are its rows from now on."""
        self._join()
        self.recent = [tensor[rows.to(tensor.device)] for tensor in self.recent]
        self.recent_is_text = [tensor[rows.to(tensor.device)] for tensor in self.recent_is_text]
        if self.visual_states is not None and self.visual_places is not None:
            on_device = rows.to(self.visual_states.device)
            self.visual_states, self.visual_places = self.visual_states[on_device], self.visual_places[on_device]
        order: Sequence[int] = rows.tolist()
        self.images = [self.images[row] for row in order]
        self.image_places = [self.image_places[row] for row in order]
        self.invocations = [self.invocations[row] for row in order]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            rows = torch.arange(len(self.images))
            self._select(rows[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._select(torch.arange(len(self.images)).repeat_interleave(repeats))

    def reset(self) -> None:
        self._forget()

    def crop(self, tokens_to_remove: int) -> None:
        """As `VisualMemory.crop`. Text that had been dropped from the window before does not come back."""
        length = self.length + tokens_to_remove if tokens_to_remove <= 0 else min(self.length, tokens_to_remove)
        self._join()
        if self.recent:
            self._keep_columns(self.recent_columns[0] < length)
        if self.visual_places is not None:
            self.visual_places = torch.where(self.visual_places < length, self.visual_places, -1)
        self._crop_images(length)
        self.invocations = [tuple(each for each in row if each.place < length) for row in self.invocations]
        self.length = length

    def _crop_images(self, length: int) -> None:
        """Forget the images of calls from `length` on, and all of a row that has no visual token left."""
        for row, places in enumerate(self.image_places):
            left = self.visual_places is not None and bool((self.visual_places[row] >= 0).any())
            count = sum(place < length for place in places) if left else 0
            self.images[row], self.image_places[row] = self.images[row][:count], places[:count]

    def offload(self) -> None:
        """Small: it stays where it is."""

    def prefetch(self) -> None:
        """See `offload`."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise TypeError("the invoked memory has no keys and values of its own")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


def needed(is_text: Tensor, window: int) -> Tensor:
    """Which columns hold one of the last `window` text tokens of a row: is_text bool [B, S] -> bool [S]."""
    later = is_text.flip(1).long().cumsum(1).flip(1)  # how many there are from each column on
    return (is_text & (later <= window)).any(0)


def rows_of(states: Tensor, mask: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """The states [B, S, d] that are in mask bool [B, S], row by row, [B, V, d], and their places [B, V], -1 where a
    row has no more. places int64 [S]: the columns'."""
    counts = mask.sum(1)
    longest = int(counts.max())
    rows, columns = [], []
    for row, own in enumerate(mask):
        missing = longest - int(counts[row])
        rows.append(pad(states[row, own], (0, 0, 0, missing)))
        columns.append(pad(places[own], (0, missing), value=-1))
    return torch.stack(rows), torch.stack(columns)
