"""Tokens that one form of a model has and the other has not: what is compared is what both know."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from surgeon.parity.runner import Trace


@dataclass(frozen=True)
class AddedTokens:
    """Of the candidate alone."""

    ids: tuple[int, ...]
    may_lead: bool
    """Whether one may be the likeliest: trained ones, and those that do not start as the mean of the source's rows."""

    @classmethod
    def between(
        cls, reference: Mapping[str, Any] | None, candidate: Mapping[str, Any] | None, tuned: bool
    ) -> Self | None:
        """From the two records; None where the candidate has no token more. `tuned`: its rows may be trained."""
        added = tokens_added(reference, candidate)
        if not added:
            return None
        entries = [entry.get("memory-tokens", {}) for entry in (candidate or {}).get("passes", [])]
        means = {token for entry in entries if entry.get("init") == "mean" for token in entry.get("tokens", [])}
        return cls(tuple(added.values()), tuned or not means.issuperset(added))

    def leading(self, trace: Trace) -> int:
        """At how many steps one of them is the likeliest."""
        return int(np.isin(trace.step_logits.argmax(-1), self.ids).sum())

    def judged_steps(self, reference: Trace) -> int:
        """How many steps there are up to the first at which the reference, which has them not, answers with one of
        their ids: rows that no token of its own has. What it is fed then is another token to the candidate."""
        at = np.flatnonzero(np.isin(reference.tokens, self.ids).any(0))
        return int(at[0]) + 1 if len(at) else reference.tokens.shape[1]

    def left_out(self, trace: Trace, vocab_size: int) -> Trace:
        """The logits of the first `vocab_size` tokens without these; the tokens that were fed stay as they are."""
        columns = np.setdiff1d(np.arange(min(vocab_size, trace.step_logits.shape[-1])), self.ids)
        return replace(
            trace,
            prompt_logits=[row[:, columns] for row in trace.prompt_logits],
            step_logits=trace.step_logits[..., columns],
        )


def tokens_added(reference: Mapping[str, Any] | None, candidate: Mapping[str, Any] | None) -> dict[str, int]:
    """Token -> id of those that the candidate's record alone has."""
    known = (reference or {}).get("tokens") or {}
    tokens: dict[str, int] = (candidate or {}).get("tokens") or {}
    return {token: token_id for token, token_id in tokens.items() if token not in known}
