"""Generate text from a bundle or engines: batches, streaming, rows that end at different times and call for memory."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from surgeon.generation import Answers, Generation, OnText, Sampling, sample
from surgeon.inputs import Message, Prompt
from surgeon.memory.invoking_generation import AllowedMemoryTokens, Settings, only
from surgeon.positions import Positions

if TYPE_CHECKING:
    from exporters.runtime.runtime import Runtime
    from exporters.runtime.state import State


def answer(
    runtime: "Runtime",
    prompts: Sequence[Prompt | list[Message]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    on_text: OnText | None = None,
    positions: Positions | None = None,
    settings: Settings | None = None,
) -> list[Generation]:
    """Answer prompts in one batch, each with its own images; greedy unless `sampling` says otherwise.
    `positions`: as for `Runtime.prepare`. `settings`: how memory is called for, of a model that does; by default not.

    A row ends with one of the model's end-of-sequence tokens ("stop"), or after `max_new_tokens`, or when prompt,
    answer and memory together are as long as the bundle's maximum (both "length"). Raises InputError for a prompt or
    image that cannot be used, BundleError for a prompt that is longer than the bundle's maximum.
    """
    sampling = sampling or Sampling()
    generators = sampling.generators(len(prompts))
    inputs = runtime.prepare(prompts, positions)
    state, logits = runtime.start(inputs)
    limits = [min(max_new_tokens, runtime.max_length - int(length)) for length in state.lengths]
    tokens_of_memory = runtime.memory_tokens
    answers = Answers(runtime.inputs.decode, runtime.manifest.tokens.eos, limits, on_text, tokens_of_memory)
    calls = None if tokens_of_memory is None else _Calls(runtime, settings or Settings("off", 0), len(prompts))
    while (active := answers.active).any():
        logits[~active] = 0  # they mean nothing
        if calls is not None:
            calls.allow(state, logits, active)
        tokens = sample(logits, sampling, generators)
        answers.push(tokens)
        if not answers.active.any():
            break
        logits = runtime.step(state, tokens, answers.active)
        if calls is not None:
            calls.answer(state, answers, tokens, logits)
    return answers.generations()


class _Calls:
    """Where the rows of a batch may call for memory, and what happens when they do."""

    def __init__(self, runtime: "Runtime", settings: Settings, rows: int) -> None:
        assert runtime.memory_tokens is not None
        self.runtime, self.tokens, self.settings = runtime, runtime.memory_tokens, settings
        self.ids: list[list[int]] = [[] for _ in range(rows)]

    def allow(self, state: "State", logits: np.ndarray, active: np.ndarray) -> None:
        """Leave each row's logits [V] the tokens that may come next, in place."""
        looks_at_images = self.runtime.manifest.vismem is not None and self.runtime.manifest.vismem.short_former
        for row in np.flatnonzero(active).tolist():
            remembered = state.remembered[row]
            blind = torch.tensor([looks_at_images == "vision" and not remembered.images])
            room = self.runtime.max_length - int(state.lengths[row]) > self.tokens.longest
            settings = self.settings if room else Settings(self.settings.mode, 0)
            allowed = AllowedMemoryTokens(self.tokens, settings, 0, blind)
            ids = torch.tensor([self.ids[row]], dtype=torch.int64)
            scores = allowed(ids, torch.from_numpy(logits[row : row + 1]))
            logits[row] = (scores if allowed.called is None else only(allowed.called, scores))[0].numpy()

    def answer(self, state: "State", answers: Answers, tokens: np.ndarray, logits: np.ndarray) -> None:
        """The tokens [B] were fed, logits [B, V] are what came of them: those of rows that called for memory are
        replaced by what follows it."""
        for row in np.flatnonzero(answers.active).tolist():
            token = int(tokens[row])
            self.ids[row].append(token)
            kind = self.tokens.kind_of(token)
            if kind is None:
                continue
            logits[row] = self.runtime.invoke(state, row, kind)
            self.ids[row].append(self.tokens.end[kind])
            answers.timed(row, state.remembered[row].forming_seconds[-1])
            answers.limit(row, self.runtime.max_length - int(state.lengths[row]))
