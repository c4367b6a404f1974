"""Generate text from a bundle or engines: batches, streaming, rows that end at different times."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from surgeon.generation import Answers, Generation, OnText, Sampling, sample
from surgeon.inputs import Message, Prompt
from surgeon.positions import Positions

if TYPE_CHECKING:
    from exporters.runtime.runtime import Runtime


def answer(
    runtime: "Runtime",
    prompts: Sequence[Prompt | list[Message]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    on_text: OnText | None = None,
    positions: Positions | None = None,
) -> list[Generation]:
    """Answer prompts in one batch, each with its own images; greedy unless `sampling` says otherwise.
    `positions`: as for `Runtime.prepare`.

    A row ends with one of the model's end-of-sequence tokens ("stop"), or after `max_new_tokens`, or when prompt and
    answer together are as long as the bundle's maximum (both "length"). Raises InputError for a prompt or image that
    cannot be used, BundleError for a prompt that is longer than the bundle's maximum.
    """
    sampling = sampling or Sampling()
    generator = sampling.generator()
    inputs = runtime.prepare(prompts, positions)
    state, logits = runtime.start(inputs)
    limits = [min(max_new_tokens, runtime.max_length - int(length)) for length in state.lengths]
    answers = Answers(runtime.inputs.decode, runtime.manifest.tokens.eos, limits, on_text)
    while (active := answers.active).any():
        logits[~active] = 0  # they mean nothing
        tokens = sample(logits, sampling, generator)
        answers.push(tokens)
        if answers.active.any():
            logits = runtime.step(state, tokens, answers.active)
    return answers.generations()
