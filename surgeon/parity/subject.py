"""What a validator needs of a model, whatever runs it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from surgeon.inputs import Prompt


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
    """int64 [B, steps]: the tokens that were fed, greedy or given."""


class Subject(Protocol):
    """A checkpoint or a bundle, loaded."""

    path: str
    stage: str
    """`checkpoint` or `bundle`."""
    dtype: str
    """`fp32`, `fp16` or `bf16`: what its activations are in."""
    record: Mapping[str, Any] | None
    """The pass record, None for an unpatched model."""

    def trace(self, prompts: Sequence[Prompt], steps: int, tokens: np.ndarray | None = None) -> Trace:
        """Prefill and decode. `tokens` [B, steps] are fed instead of the greedy ones where given."""

    def tensors(self, prompts: Sequence[Prompt]) -> dict[str, list[np.ndarray]] | None:
        """What is computed on the way through a prefill, in order: name -> each row's tensor, padding left out; None
        for a form that cannot be looked into. `hidden_states.<i>` [S_b, d] is decoder layer i's output, before
        DeepStack is added."""
