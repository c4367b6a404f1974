"""Generate text from a bundle or engines: batches, streaming, rows that end at different times."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from exporters.runtime.runtime import Runtime
from surgeon.generation import FinishReason, Rows, Sampling, TextStream, sample
from surgeon.inputs import Message, Prompt
from surgeon.positions import Positions

OnText = Callable[[int, str], None]
"""Called with a row and the text that was added to it."""


@dataclass(frozen=True)
class Generation:
    """What one prompt was answered. `token_ids` ends with the end-of-sequence token where the reason is "stop"."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason


def generate(
    runtime: Runtime,
    prompts: Sequence[Prompt | list[Message]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    on_text: OnText | None = None,
    positions: Positions | None = None,
) -> list[Generation]:
    """Answer prompts in one batch, each with its own pictures; greedy unless `sampling` says otherwise.
    `positions`: as for `Runtime.prepare`.

    A row ends with one of the model's end-of-sequence tokens ("stop"), or after `max_new_tokens`, or when prompt and
    answer together are as long as the bundle's maximum (both "length"). Raises InputError for a prompt or picture that
    cannot be used, BundleError for a prompt that is longer than the bundle's maximum.
    """
    sampling = sampling or Sampling()
    generator = sampling.generator()
    inputs = runtime.prepare(prompts, positions)
    state, logits = runtime.start(inputs)
    limits = [min(max_new_tokens, runtime.max_length - int(length)) for length in state.lengths]
    rows = Rows([runtime.manifest.tokens.eos] * len(prompts), limits)
    streams = [TextStream(runtime.inputs.decode) for _ in prompts]
    texts = [""] * len(prompts)

    def emit(row: int, text: str) -> None:
        texts[row] += text
        if text and on_text is not None:
            on_text(row, text)

    while (active := rows.active).any():
        logits[~active] = 0  # they mean nothing
        tokens = sample(logits, sampling, generator)
        rows.push(tokens)
        for row in np.flatnonzero(active).tolist():
            emit(row, streams[row].push(int(tokens[row])))
            if not rows.active[row]:
                emit(row, streams[row].finish())
        if rows.active.any():
            logits = runtime.step(state, tokens, rows.active)
    return [
        Generation(text, token_ids, reason)
        for text, token_ids, reason in zip(texts, rows.token_ids, rows.finish_reasons, strict=True)
        if reason is not None
    ]
