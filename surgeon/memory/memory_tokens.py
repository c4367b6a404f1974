"""The tokens by which a model calls for memory: which they are, and what may follow which.

An invoke token is followed by as many placeholders as its memory has latents, one a step, and by its end token; nothing
else may stand there, and placeholders and end tokens may stand nowhere else. So what a row has to emit next can be read
off its ids, in any search, batch or engine.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

Kind = Literal["short", "long"]
Mode = Literal["auto", "off", "always"]
SHORT: Kind = "short"
LONG: Kind = "long"
KINDS = (SHORT, LONG)
MODES: tuple[Mode, ...] = ("auto", "off", "always")
MAX_INVOCATIONS = 8
"""In one answer, unless the caller says otherwise."""


@dataclass(frozen=True)
class MemoryTokens:
    """A model's."""

    invoke: Mapping[Kind, int]
    end: Mapping[Kind, int]
    placeholder: int
    latents: Mapping[Kind, int]
    """How many placeholders follow an invoke token."""
    separators: tuple[int, ...] = ()
    """Tokens that end a sentence or a line, behind which `always` calls for memory."""

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """As the pass recorded them."""
        ids = record["token_ids"]
        return cls(
            invoke={kind: ids[kind][0] for kind in KINDS},
            end={kind: ids[kind][1] for kind in KINDS},
            placeholder=ids["placeholder"],
            latents={kind: record[kind] for kind in KINDS},
            separators=tuple(record["separators"]),
        )

    @property
    def ids(self) -> tuple[int, ...]:
        """All of them."""
        return (*self.invoke.values(), *self.end.values(), self.placeholder)

    @property
    def longest(self) -> int:
        """Tokens of an invocation at most: invoke token, placeholders and end token."""
        return max(self.latents.values()) + 2

    def kind_of(self, token: int) -> Kind | None:
        """The memory that an invoke token calls for; None of any other token."""
        return next((kind for kind in KINDS if self.invoke[kind] == token), None)

    def forced(self, input_ids: Tensor) -> Tensor:
        """The token that each row of ids [B, S] has to go on with, int64 [B]; -1 where it is free."""
        if not input_ids.shape[1]:  # after embeddings alone
            return input_ids.new_full(input_ids.shape[:1], -1)
        tail = input_ids[:, -self.longest :].flip(1)  # the latest first
        is_placeholder = tail == self.placeholder
        count = is_placeholder.long().cumprod(1).sum(1)
        before = tail.gather(1, count.clamp(max=tail.shape[1] - 1)[:, None])[:, 0]
        forced = torch.full_like(count, -1)
        for kind in KINDS:
            within = (before == self.invoke[kind]) & (count < tail.shape[1])
            forced = torch.where(within & (count < self.latents[kind]), self.placeholder, forced)
            forced = torch.where(within & (count == self.latents[kind]), self.end[kind], forced)
        return forced

    def is_one(self, input_ids: Tensor) -> Tensor:
        """Which of the ids [...] are memory tokens, bool [...]."""
        return torch.isin(input_ids, torch.tensor(self.ids, device=input_ids.device))

    def invocations(self, input_ids: Tensor) -> Tensor:
        """How many invoke tokens each row of ids [B, S] has, int64 [B]."""
        invoke = torch.tensor(list(self.invoke.values()), device=input_ids.device)
        return torch.isin(input_ids, invoke).sum(1)
