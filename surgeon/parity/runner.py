"""What a validator needs of a model, whatever runs it."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from surgeon.inputs import Inputs, Prompt
from surgeon.positions import Positions


@dataclass(frozen=True)
class Trace:
    """One batch of prompts, and `steps` tokens decoded after each."""

    prompt_ids: list[np.ndarray]
    """Each row's tokens, int64 [S_b], padding left out."""
    prompt_logits: list[np.ndarray]
    """Each row's logits over its prompt, fp32 [S_b, V]."""
    step_logits: np.ndarray
    """fp32 [B, steps, V]: the logits from which token i was taken."""
    tokens: np.ndarray
    """int64 [B, steps]: the tokens that were fed, greedy or forced."""

    def first_steps(self, count: int) -> "Trace":
        """The same, cut to so many steps."""
        return replace(self, step_logits=self.step_logits[:, :count], tokens=self.tokens[:, :count])


class Runner(Protocol):
    """A checkpoint, a bundle or engines, loaded."""

    path: str
    stage: str
    """`checkpoint`, `bundle` or `engine`."""
    dtype: str
    """`fp32`, `fp16` or `bf16`: what its activations are in."""
    record: Mapping[str, Any] | None
    """The pass record, None for an unpatched model."""

    positions: Positions | None
    """Which position ids tiles get in what it is asked next; None: those that it records."""

    @property
    def inputs(self) -> Inputs:
        """What makes its prompts."""

    def trace(self, prompts: Sequence[Prompt], steps: int, tokens: np.ndarray | None = None) -> Trace:
        """Prefill and decode. `tokens` [B, steps], if not None, are fed instead of the greedy ones."""

    def tensors(self, prompts: Sequence[Prompt]) -> dict[str, list[np.ndarray]] | None:
        """What is computed on the way through a prefill, in order: name -> each row's tensor, padding left out; None
        for a form that cannot be looked into. `hidden_states.<i>` [S_b, d] is decoder layer i's output, before
        DeepStack is added."""

    def gates(self) -> dict[str, float] | None:
        """Every graft's gates, by parameter name: the value farthest from zero. None for a form that does not show
        them."""

    def with_gates(self, values: Mapping[str, float]) -> AbstractContextManager[None]:
        """Until the end of the `with`, the gates of these names have these values, in memory: no file is written.
        Names that it does not have are left out."""
