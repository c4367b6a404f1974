"""What belongs to one request, and the tokens that it is fed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from exporters.runtime.remembered import Remembered
from surgeon.inputs import ModelInputs

Wanted = Literal["last", "all"]


@dataclass
class State:
    """Everything of one request (a batch of rows): its caches, its visual memory and how far each row is. Nothing of it
    is kept anywhere else, so states may be used in any order."""

    lengths: np.ndarray
    """Tokens of each row so far, int64 [B]."""
    next_positions: np.ndarray
    """The position id of each row's next token, int64 [B]."""
    caches: dict[str, Tensor]
    """`past_keys.<i>`, `past_values.<i>` [B, Hkv, Smax, hd]; written in place."""
    memory: dict[str, Tensor]
    """`memory_keys.<entry>`, `memory_values.<entry>` [B, Hm, M, hd]."""
    memory_mask: np.ndarray
    """bool [B, M]: which slots of the memory a row uses."""
    memory_places: np.ndarray
    """int64 [B, M]: where in its row's sequence what is in a slot stands; 0 where a row does not use it."""
    remembered: list[Remembered] = field(default_factory=list)
    """Of each row, where the model calls for memory."""
    last_hidden_state: np.ndarray | None = None
    """fp32 [B, S, d], of the tokens of the latest call, where the decoder gives it."""
    extra: dict[str, np.ndarray] = field(default_factory=dict)
    """The extra outputs of the latest call, by name, fp32 where they are floating."""
    binding: tuple[Any, list[Any]] | None = None
    """What a runtime prepared for a decoding step, and the arrays that it bound; see `bound`."""

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    def bound(self) -> Any:
        """The binding set by `bind`; None without one, or where other arrays hold the request since: of rows that were
        selected or copied."""
        if self.binding is None or list(map(id, self.binding[1])) != list(map(id, self._arrays())):
            return None
        return self.binding[0]

    def bind(self, prepared: Any) -> Any:
        """Keep what a runtime prepared for a decoding step, with everything bound that does not change from step to
        step."""
        self.binding = prepared, self._arrays()
        return prepared

    def _arrays(self) -> list[Any]:
        return [*self.caches.values(), *self.memory.values(), self.memory_mask]

    def write_memory(self, entries: Mapping[str, Tensor], mask: np.ndarray, places: np.ndarray) -> None:
        """Put keys and values `memory_*` [B, Hm, M', hd], of which a row uses those in mask bool [B, M'], behind what
        is in the memory. places int64 [B, M']: where in the sequence they stand."""
        new = dict(entries)
        if self.memory_mask.any():
            new = {name: torch.cat((self.memory[name], tensor), 2) for name, tensor in new.items()}
            mask = np.concatenate((self.memory_mask, mask), axis=1)
            places = np.concatenate((self.memory_places, places), axis=1)
        self.memory, self.memory_mask, self.memory_places = new, mask, places
        self.binding = None

    def advance(self, rows: Sequence[np.ndarray], position_ids: np.ndarray) -> None:
        """Each row has got the tokens of `rows`, at position_ids [A, B, S]: the next comes after the last id."""
        for row, ids in enumerate(rows):
            self.next_positions[row] = position_ids[:, row, : len(ids)].max() + 1
            self.lengths[row] += len(ids)


@dataclass(frozen=True)
class Tokens:
    """New tokens of some rows, padded on the right, as the decoder takes them."""

    inputs_embeds: np.ndarray
    position_ids: np.ndarray
    write_indices: np.ndarray
    logits_indices: np.ndarray
    visual_token_mask: np.ndarray
    deepstack: np.ndarray | None

    def feeds(self) -> dict[str, np.ndarray]:
        """By the names of the decoder's inputs."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def columns(self, begin: int, end: int, logits_indices: np.ndarray) -> "Tokens":
        """Some of them, of all rows, as if those before them had been fed; logits_indices int64 [B, T] among them."""
        some = slice(begin, end)
        return Tokens(
            inputs_embeds=self.inputs_embeds[:, some],
            position_ids=self.position_ids[:, :, some],
            write_indices=self.write_indices + begin,
            logits_indices=logits_indices,
            visual_token_mask=self.visual_token_mask[:, some],
            deepstack=None if self.deepstack is None else self.deepstack[:, :, some],
        )

    def of_row(self, row: int, length: int, logits: Wanted) -> "Tokens":
        """One row's, without padding."""
        one = slice(row, row + 1)
        return Tokens(
            inputs_embeds=self.inputs_embeds[one, :length],
            position_ids=self.position_ids[:, one, :length],
            write_indices=self.write_indices[one],
            logits_indices=self.logits_indices[one, : length if logits == "all" else 1],
            visual_token_mask=self.visual_token_mask[one, :length],
            deepstack=None if self.deepstack is None else self.deepstack[:, one, :length],
        )


def rows_of(inputs: ModelInputs) -> list[np.ndarray]:
    """Each row's token ids without its padding, wherever that is."""
    masks = inputs.attention_mask.astype(bool)
    return [ids[mask] for ids, mask in zip(inputs.input_ids, masks, strict=True)]


def stack(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows [1, S, ...] of different lengths as one batch, padded with zeros."""
    longest = max(row.shape[1] for row in rows)
    rest = [(0, 0)] * (rows[0].ndim - 2)
    return np.concatenate([np.pad(row, ((0, 0), (0, longest - row.shape[1]), *rest)) for row in rows])


def stays_on_device(name: str) -> bool:
    """Whether an input or output is of caches or memory, which the host does not look into."""
    return name.startswith(("past_", "present_", "memory_keys", "memory_values"))
