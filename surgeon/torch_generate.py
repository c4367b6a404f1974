"""Answer one prompt with a checkpoint, by transformers' own `generate`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from surgeon.checkpoint.reader import Checkpoint
from surgeon.generation import FinishReason, Sampling, TextStream, sample
from surgeon.inputs import Inputs, Prompt
from surgeon.models import config_of, load
from surgeon.positions import Positions


@dataclass(frozen=True)
class Answer:
    """`token_ids` ends with the end-of-sequence token where the reason is "stop"."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason


def answer(
    path: str | Path,
    prompt: Prompt,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    on_text: Callable[[str], None] | None = None,
    device: str | None = None,
    positions: Positions | None = None,
) -> Answer:
    """The answer of a checkpoint, plain or patched, in its own dtype; greedy unless `sampling` says otherwise.

    Tokens are drawn as for a bundle, and of the checkpoint's generation_config only the ending tokens count: nothing
    unseen (a temperature, a repetition penalty) changes what was asked for. `device` defaults to CUDA where there is
    one. `on_text` gets the text as it comes. `positions`: as for `Inputs.prepare`. Raises CheckpointError, FamilyError,
    InputError, and SurgeonError for logits that are not finite.
    """
    with Checkpoint.open(path) as checkpoint:
        directory = checkpoint.directory
        config_of(checkpoint)  # what has to be imported first often has no tokenizer that could be read
    inputs = Inputs.from_directory(directory)
    # before the weights are loaded: a bad picture is told at once
    prepared = inputs.prepare([prompt], positions=positions)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load(directory, device=device)
    # in the place of the checkpoint's: what a config given to `generate` does not say would be taken from there
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=list(inputs.eos_token_ids) or None,
        pad_token_id=inputs.pad_token_id,
    )
    ids = model.generate(
        **prepared.model_kwargs(model.dtype, device),
        logits_processor=LogitsProcessorList([_Drawn(sampling or Sampling())]),
        streamer=None if on_text is None else _Streamer(inputs, on_text),
    )
    tokens = ids[0, prepared.input_ids.shape[1] :].tolist()
    return Answer(inputs.decode(tokens), tokens, "stop" if tokens[-1] in inputs.eos_token_ids else "length")


class _Drawn(LogitsProcessor):
    """Draws each row's token, and leaves no other to the search that follows."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling, self._generator = sampling, sampling.generator()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores [B, V] -> the same with -inf everywhere but at one token of each row."""
        tokens = torch.from_numpy(sample(scores.float().cpu().numpy(), self._sampling, self._generator))
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(1, tokens[:, None].to(scores.device), 0.0)


class _Streamer(BaseStreamer):
    """Hands over the text of a single row as it becomes certain."""

    def __init__(self, inputs: Inputs, on_text: Callable[[str], None]) -> None:
        self._stream = TextStream(inputs.decode)
        self._on_text = on_text
        self._in_prompt = True

    def put(self, value: Tensor) -> None:
        """The prompt's ids first, then each new token."""
        if self._in_prompt:
            self._in_prompt = False
        elif text := self._stream.push(int(value.item())):
            self._on_text(text)

    def end(self) -> None:
        if text := self._stream.finish():
            self._on_text(text)
