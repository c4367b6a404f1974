"""Answer prompts with a checkpoint, by transformers' own `generate`."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from surgeon.checkpoint.reader import Checkpoint
from surgeon.errors import OptionError
from surgeon.generation import Answers, Generation, OnText, Sampling, sample
from surgeon.inputs import Inputs, Message, Prompt
from surgeon.memory.invoked_memory import InvokedMemory
from surgeon.memory_use import MemoryTokens, Mode, memory_settings, memory_tokens_of
from surgeon.models import config_of, config_values, load, read_config
from surgeon.positions import Positions, record_of


class TorchGenerator:
    """A checkpoint, plain or patched, or a model that is loaded already, as what answers prompts."""

    def __init__(
        self, model: str | Path | PreTrainedModel, inputs: Inputs | None = None, device: str | None = None
    ) -> None:
        """model: a checkpoint's path or hub id, whose weights are loaded, in their own dtype, when the first prompt has
        been prepared; or a model in memory, which stays where it is and as it is. inputs: tokenizer and image
        processor, by default those of the directory that the model is from. device: of a checkpoint, by default CUDA
        where there is one. Raises CheckpointError, FamilyError."""
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        path: Any = model.config._name_or_path if isinstance(model, PreTrainedModel) else model
        if inputs is None and not path:
            raise OptionError(
                "this model in memory names no directory that its tokenizer and image processor are in: pass "
                "TorchGenerator(model, Inputs.from_directory(DIR))"
            )
        if inputs is None:
            with Checkpoint.open(path, weights="optional") as checkpoint:
                path = checkpoint.directory
                config_of(checkpoint)  # what has to be imported first often has no tokenizer that could be read
            inputs = Inputs.from_directory(path)
            if isinstance(model, PreTrainedModel):  # which may have been grafted into since
                inputs.config = read_config(config_values(model), plain=True)
        self._path, self.inputs = path, inputs
        if isinstance(model, PreTrainedModel):
            self.model = model

    @cached_property
    def model(self) -> Any:
        return load(self._path, device=self._device)

    def generate(
        self,
        prompts: Sequence[Prompt | list[Message]],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        on_text: OnText | None = None,
        positions: Positions | None = None,
        memory: Mode | None = None,
        max_invocations: int | None = None,
    ) -> list[Generation]:
        """As `exporters.runtime.generate`: greedy unless `sampling` says otherwise.

        Tokens are drawn as for a bundle, and of the checkpoint's generation_config only the ending tokens count:
        nothing unseen (a temperature, a repetition penalty) changes what was asked for. Raises CheckpointError,
        FamilyError, InputError, and SurgeonError for logits that are not finite.
        """
        if isinstance(model := self.__dict__.get("model"), PreTrainedModel):
            _check_keeps_cache(model)
        # first, so that a bad image is reported at once
        tokens = memory_tokens_of(record_of(self.inputs.config))
        settings = memory_settings(tokens, memory, max_invocations)
        prepared = self.inputs.prepare(prompts, positions=positions)
        limits = [max_new_tokens] * len(prompts)
        answers = Answers(self.inputs.decode, self.inputs.eos_token_ids, limits, on_text, tokens)
        if not answers.active.any():
            return answers.generations()
        before = self.model.generation_config
        # replaced, because `generate` takes whatever the passed config leaves unset from the model's own
        self.model.generation_config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(self.inputs.eos_token_ids) or None,
            pad_token_id=self.inputs.pad_token_id,
        )
        kwargs = {} if tokens is None else {"memory": settings.mode, "max_invocations": settings.max_invocations}
        try:
            output = self.model.generate(
                **prepared.model_kwargs(self.model.dtype, self.model.device),
                **kwargs,
                logits_processor=LogitsProcessorList([_Drawn(sampling or Sampling(), len(prompts), tokens)]),
                streamer=_Streamer(answers),
                return_dict_in_generate=True,
            )
        finally:
            self.model.generation_config = before
        if tokens is not None:
            _add_times(answers, output.past_key_values)
        return answers.generations()


def _add_times(answers: Answers, cache: Any) -> None:
    """How long the invocations of each row took."""
    memory = InvokedMemory.of(cache)
    for row, invocations in enumerate([] if memory is None else memory.invocations):
        for invocation in invocations:
            answers.timed(row, invocation.seconds)


class _Drawn(LogitsProcessor):
    """Draws each row's token, and leaves no other to the search that follows."""

    def __init__(self, sampling: Sampling, rows: int, memory_tokens: MemoryTokens | None) -> None:
        self._sampling, self._generators, self._memory_tokens = sampling, sampling.generators(rows), memory_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores [B, V] -> the same with -inf everywhere but at one token of each row."""
        free = None
        if self._memory_tokens is not None:  # what is forced is not drawn
            free = (self._memory_tokens.forced(input_ids) < 0).cpu().numpy()
        tokens = torch.from_numpy(sample(scores.float().cpu().numpy(), self._sampling, self._generators, free))
        forced_scores = torch.full_like(scores, -torch.inf)
        return forced_scores.scatter_(1, tokens[:, None].to(scores.device), 0.0)


class _Streamer(BaseStreamer):
    """Hands each step's tokens to the answers."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._in_prompt = True

    def put(self, value: Tensor) -> None:
        """The prompts' ids first, then each step's tokens [B]."""
        if not self._in_prompt:
            self._answers.push(value.reshape(-1).numpy(force=True))
        self._in_prompt = False

    def end(self) -> None: ...


def _check_keeps_cache(model: PreTrainedModel) -> None:
    if model.training and model.is_gradient_checkpointing:
        raise OptionError(
            "the model is being trained with gradient checkpointing, under which transformers keeps no cache and "
            "answers otherwise: call model.eval() first"
        )
