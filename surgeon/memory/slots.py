"""The slots of the visual memory: which of them a row uses, where they stand, and which tokens see them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from surgeon.memory.visibility import Visibility, causally


@dataclass(frozen=True)
class Slots:
    """M slots of each row; a slot holds one visual embedding's keys and values of every graft."""

    mask: Tensor
    """bool [B, M], False where a row has no more."""
    places: Tensor
    """int64 [B, M]: where each stands in the sequence, counted as the columns of the KV cache are."""
    sample_ids: Tensor | None = None
    """int64 [B, M], where several samples are packed into a row."""

    def followed_by(self, new: Self) -> "Slots":
        """These, and new ones behind them."""
        samples = None
        if self.sample_ids is not None and new.sample_ids is not None:
            samples = torch.cat((self.sample_ids, new.sample_ids), 1)
        return Slots(torch.cat((self.mask, new.mask), 1), torch.cat((self.places, new.places), 1), samples)

    def seen_by(self, token_places: Tensor | None, sample_ids: Tensor | None) -> Tensor:
        """Which of them each token sees: bool [B, M], or [B, S, M] where the tokens of a row differ.

        token_places int64 [S]: the tokens' own places, where some of the slots may stand behind them and are hidden
        then; None where every token sees all. sample_ids int64 [B, S]: the tokens' samples, where samples are packed.
        """
        mask = self.mask
        if sample_ids is not None and self.sample_ids is not None:
            mask = mask[:, None] & (sample_ids[:, :, None] == self.sample_ids[:, None])
        return mask if token_places is None else causally(mask, self.places, token_places)

    def before(self, length: int | Tensor) -> "Slots":
        """The same slots, those that stand at or behind `length` no longer in use."""
        return Slots(self.mask & (self.places < length), self.places, self.sample_ids)

    def each_row(self, change: Callable[[Tensor], Tensor]) -> "Slots":
        """The slots with `change`, which reorders or repeats rows, applied to every tensor."""
        samples = None if self.sample_ids is None else change(self.sample_ids)
        return Slots(change(self.mask), change(self.places), samples)


@dataclass(frozen=True)
class Entering:
    """What enters the memory in one call."""

    embeds: Tensor
    """[B, M, d], as they enter the decoder."""
    position_ids: Tensor
    """int64 [A, B, M]."""
    slots: Slots

    @classmethod
    def from_sequence(
        cls,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        token_places: Tensor,
        entering: Tensor,
        sample_ids: Tensor | None,
    ) -> "Entering":
        """The tokens `entering`, bool [B, S], of a sequence: inputs_embeds [B, S, d], position_ids [A, B, S],
        token_places [S], sample_ids [B, S] or None."""
        positions = gather_rows(position_ids.permute(1, 2, 0), entering).permute(2, 0, 1)
        places = gather_rows(token_places.expand(entering.shape), entering)
        samples = None if sample_ids is None else gather_rows(sample_ids, entering)
        return cls(gather_rows(inputs_embeds, entering), positions, Slots(filled(entering), places, samples))

    @classmethod
    def nothing(cls, inputs_embeds: Tensor) -> "Entering":
        """A slot that no row uses, for training without images: grafts add exactly nothing then, and have gradients
        of zero, so that a backbone that is frozen and processes with other data need not be special."""
        batch_size, _, width = inputs_embeds.shape
        places = torch.zeros((batch_size, 1), dtype=torch.int64, device=inputs_embeds.device)
        embeds = inputs_embeds.new_zeros((batch_size, 1, width))
        return cls(embeds, places[None], Slots(torch.zeros_like(places, dtype=torch.bool), places))


def token_places_if(visibility: Visibility, token_places: Tensor, entering: Entering | None) -> Tensor | None:
    """What `Slots.seen_by` takes: the tokens' places where it makes a difference. Whatever was in the memory before
    this call stands before its tokens."""
    return token_places if visibility == "causal" and entering is not None else None


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
