"""Generation by transformers' own searches, of a model that calls for memory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import GenerationMode

from surgeon.memory.memory_tokens import KINDS, MAX_INVOCATIONS, MODES, SHORT, MemoryTokens, Mode

_SETTINGS = "memory_settings"


@dataclass(frozen=True)
class Settings:
    """What a caller of `generate` wants of memory."""

    mode: Mode
    max_invocations: int

    @classmethod
    def of(cls, mode: Any, max_invocations: Any) -> "Settings":
        """Raises ValueError for values that they cannot have."""
        if mode not in MODES:
            raise ValueError(f"memory={mode!r}: choose one of {', '.join(map(repr, MODES))}")
        most = MAX_INVOCATIONS if max_invocations is None else max_invocations
        if not isinstance(most, int) or isinstance(most, bool) or most < 0:
            raise ValueError(f"max_invocations={most!r}: it is how many invocations an answer has at most, 0 or more")
        return cls(mode, 0 if mode == "off" else most)


class InvokingGeneration:
    """In front of the patched model's classes: `generate(..., memory="auto", max_invocations=8)`.

    memory: "auto", when the model says so; "off"; or "always", at the beginning and behind each sentence or line, with
    the kind of memory that the model finds likelier. Lengths (max_new_tokens, max_length, min_new_tokens) count what
    the caller sees: memory tokens do not count.
    """

    memory_tokens: MemoryTokens
    rows_without_images: Callable[[dict[str, Any]], Tensor | None]
    """Of the keywords of a generation: the rows whose short memory could look at nothing, bool [B]; None where that
    does not matter."""
    config: Any

    def _prepare_generation_config(self, generation_config: Any, **kwargs: Any) -> Any:
        settings = Settings.of(kwargs.pop("memory", "auto"), kwargs.pop("max_invocations", None))
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)  # type: ignore[misc]
        setattr(generation_config, _SETTINGS, settings)
        return generation_config, model_kwargs

    def _validate_generation_mode(self, generation_mode: Any, generation_config: Any, kwargs: Any) -> None:
        assisted = generation_mode == GenerationMode.ASSISTED_GENERATION
        if assisted and _settings(generation_config).max_invocations:
            raise ValueError(
                "assisted decoding does not go with memory that is called for: pass memory='off', or no assistant"
            )
        super()._validate_generation_mode(generation_mode, generation_config, kwargs)  # type: ignore[misc]

    def _prepare_generated_length(
        self, generation_config: Any, input_ids_length: int, inputs_tensor: Any = None, **kwargs: Any
    ) -> Any:
        generation_config = super()._prepare_generated_length(  # type: ignore[misc]
            generation_config=generation_config,
            input_ids_length=input_ids_length,
            inputs_tensor=inputs_tensor,
            **kwargs,
        )
        settings = _settings(generation_config)
        generation_config.memory_visible_length = generation_config.max_length
        generation_config.memory_prompt_length = input_ids_length
        tokens = self.memory_tokens
        open_ones = (
            inputs_tensor is not None and inputs_tensor.ndim == 2 and bool((tokens.forced(inputs_tensor) >= 0).any())
        )
        generation_config.max_length += (settings.max_invocations + open_ones) * tokens.longest
        return generation_config

    def _get_logits_processor(
        self, generation_config: Any, input_ids_seq_length: int, model_kwargs: Any = None, **kwargs: Any
    ) -> Any:
        others = super()._get_logits_processor(  # type: ignore[misc]
            generation_config=generation_config,
            input_ids_seq_length=input_ids_seq_length,
            model_kwargs=model_kwargs,
            **kwargs,
        )
        tokens, settings = self.memory_tokens, _settings(generation_config)
        eos = getattr(generation_config, "_eos_token_tensor", None)
        least = max((generation_config.min_length or 0) - input_ids_seq_length, generation_config.min_new_tokens or 0)
        blind = None if model_kwargs is None else self.rows_without_images(model_kwargs)
        allowed = AllowedMemoryTokens(tokens, settings, input_ids_seq_length, blind, eos, least)
        return LogitsProcessorList([allowed, *others, ForcedMemoryTokens(tokens, allowed)])

    def _get_stopping_criteria(self, generation_config: Any, **kwargs: Any) -> Any:
        criteria = super()._get_stopping_criteria(generation_config=generation_config, **kwargs)  # type: ignore[misc]
        visible = generation_config.memory_visible_length - generation_config.memory_prompt_length
        limit = VisibleLength(self.memory_tokens, generation_config.memory_prompt_length, visible)
        if getattr(generation_config, "_pad_token_tensor", None) is not None:
            # rows end one by one, and transformers pads those that did where a criterion has ends of its own
            limit.eos_token_id = getattr(generation_config, "_eos_token_tensor", None)
        return StoppingCriteriaList([*criteria, limit])


def _settings(generation_config: Any) -> Settings:
    settings: Settings = getattr(generation_config, _SETTINGS)
    return settings


class AllowedMemoryTokens(LogitsProcessor):
    """Where a row is free: no placeholder, no end token, and an invoke token only as far as memory is wanted."""

    def __init__(
        self,
        tokens: MemoryTokens,
        settings: Settings,
        prompt_length: int,
        blind: Tensor | None = None,
        eos: Tensor | None = None,
        min_new_tokens: int = 0,
    ) -> None:
        """`blind`: rows that can have no short memory, bool [B]."""
        self.tokens, self.settings, self.prompt_length = tokens, settings, prompt_length
        self.blind, self.eos, self.min_new_tokens = blind, eos, min_new_tokens
        self.called: Tensor | None = None
        """int64 [B]: the invoke token that each row is to go on with in this step, -1 where it is free."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids [B, S], scores [B, V] -> [B, V]."""
        tokens, answers = self.tokens, input_ids[:, self.prompt_length :]
        never = torch.tensor([*tokens.end.values(), tokens.placeholder], device=scores.device)
        scores = scores.index_fill(1, never, -torch.inf)
        invoke = torch.tensor([tokens.invoke[kind] for kind in KINDS], device=scores.device)
        may_invoke = tokens.invocations(answers) < self.settings.max_invocations
        invoking = scores[:, invoke]
        if self.blind is not None:
            no_short = self.blind.to(scores.device)[:, None] & (invoke == tokens.invoke[SHORT])
            invoking = torch.where(no_short, -torch.inf, invoking)
        scores[:, invoke] = torch.where(may_invoke[:, None], invoking, -torch.inf)
        if self.settings.mode == "always":
            wanted = may_invoke & self._at_a_separator(input_ids, answers)
            self.called = torch.where(wanted, invoke[invoking.argmax(1)], -1)
        if self.eos is not None and self.min_new_tokens:
            short = visible_length(tokens, answers) < self.min_new_tokens
            eos = self.eos.to(scores.device)
            scores[:, eos] = torch.where(short[:, None], -torch.inf, scores[:, eos])
        return scores

    def _at_a_separator(self, input_ids: Tensor, answers: Tensor) -> Tensor:
        """The beginning, and behind a separator; of several one behind the other the first, memory between them or
        not."""
        separators = torch.tensor(self.tokens.separators, device=input_ids.device)
        if not answers.shape[1]:
            return torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        at_separator = torch.isin(answers[:, -1], separators)
        if answers.shape[1] == 1:
            return at_separator
        ends = torch.tensor(list(self.tokens.end.values()), device=input_ids.device)
        return at_separator & ~torch.isin(answers[:, -2], torch.cat((separators, ends)))


class ForcedMemoryTokens(LogitsProcessor):
    """The one token that comes next: within an invocation, and where `always` calls for one. Behind all others, so
    that nothing that another processor does changes it."""

    def __init__(self, tokens: MemoryTokens, allowed: AllowedMemoryTokens) -> None:
        """allowed: the processor in front of all others, of the same generation."""
        self.tokens, self.allowed = tokens, allowed

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids [B, S], scores [B, V] -> [B, V]."""
        forced = self.tokens.forced(input_ids)
        if self.allowed.called is not None:
            forced = torch.where(forced >= 0, forced, self.allowed.called.to(forced.device))
        return only(forced, scores)


def only(forced: Tensor, scores: Tensor) -> Tensor:
    """Scores [B, V] of which the rows that have a token in `forced`, int64 [B], allow no other."""
    forced = forced.to(scores.device)
    certain = torch.full_like(scores, -torch.inf).scatter_(1, forced.clamp(min=0)[:, None], 0.0)
    return torch.where((forced >= 0)[:, None], certain, scores)


class VisibleLength(StoppingCriteria):
    """A row ends when the caller sees as many tokens as were asked for."""

    eos_token_id: Tensor | None
    """Set where rows that ended can be padded."""

    def __init__(self, tokens: MemoryTokens, prompt_length: int, max_new_tokens: int) -> None:
        self.tokens, self.prompt_length, self.max_new_tokens = tokens, prompt_length, max_new_tokens

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """input_ids [B, S] -> bool [B]."""
        return visible_length(self.tokens, input_ids[:, self.prompt_length :]) >= self.max_new_tokens


def visible_length(tokens: MemoryTokens, answers: Tensor) -> Tensor:
    """How many tokens of each row of ids [B, S] the caller sees, int64 [B]."""
    return (~tokens.is_one(answers)).sum(1)
