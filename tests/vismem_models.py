"""Tiny models that call for memory, as if trained, and what their numbers are held against: the plain model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from checkpoints import tiny_checkpoint
from patching import apply
from surgeon import models
from surgeon.inputs import Inputs, Prompt, Side
from surgeon.memory.memory_tokens import Kind, MemoryTokens
from surgeon.models import family
from surgeon.saving import save

WINDOW = 64
VISMEM = f"vismem:query=4,short=3,long=5,layers=1,2,rank=4,window={WINDOW}"
FORMERS = ("vision", "language")


def recipe(short_former: str = "vision") -> tuple[str, str]:
    """Passes for `apply`."""
    return "memory-tokens", f"{VISMEM},short_former={short_former}"


def randomise_vismem(model: PreTrainedModel, seed: int = 0) -> None:
    """Query builder and formers as if they had been trained: adapters add about as much as their layers give, and no
    norm or bias is trivial. Memory tokens get rows unlike each other's."""
    generator = torch.Generator().manual_seed(seed)
    vismem: Any = model.base_model.vismem
    with torch.no_grad():
        for name, parameter in vismem.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                noise = 1 + noise * 0.2
            elif name.endswith("bias"):
                noise = noise * 0.2
            elif not name.endswith(("_init", "positions")):
                noise = noise / parameter.shape[1] ** 0.5
            parameter.copy_(noise)
        own: Any = model
        rows = list(own.memory_tokens.ids)
        tables: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
        for table in tables:
            spread = table.weight[:64].std()
            table.weight[rows] = torch.randn(len(rows), table.weight.shape[1], generator=generator).to(spread) * spread


def image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


SEEING = Prompt("What is it?", (image(96, 64),))
WORDS = Prompt("A star is a")
TWO = Prompt("Compare them.", (image(64, 64, 1), image(130, 60, 2)))


@dataclass(frozen=True)
class VisMemPair:
    """A plain checkpoint, and the same with memory to call for, as if trained; within `directory`."""

    directory: Path

    @classmethod
    def create(
        cls,
        directory: Path,
        model_type: str,
        *passes: str,
        trained: Callable[[Any], object] = randomise_vismem,
        **options: Any,
    ) -> "VisMemPair":
        source = tiny_checkpoint(directory / "source", model_type, **options)
        apply(source, directory / "patched", *(passes or recipe()))
        model = models.load(directory / "patched")
        trained(model)
        save(model, directory / "trained", directory / "patched")
        return cls(directory)

    @cached_property
    def source(self) -> Any:
        """In fp64, as the others: nothing hides in rounding, which formers make large."""
        return models.load(self.directory / "source").double()

    @cached_property
    def fresh(self) -> Any:
        """The patched model, as inserted."""
        return models.load(self.directory / "patched").double()

    @cached_property
    def model(self) -> Any:
        """The patched model, as if trained."""
        return models.load(self.directory / "trained").double()

    @cached_property
    def inputs(self) -> Inputs:
        return Inputs.from_directory(self.directory / "trained")

    @property
    def tokens(self) -> MemoryTokens:
        tokens: MemoryTokens = self.model.memory_tokens
        return tokens

    def kwargs(self, *prompts: Prompt | list[dict[str, Any]], side: Side = "left") -> dict[str, Any]:
        """The model's keywords for a batch of prompts."""
        return self.inputs.prepare(prompts, padding_side=side).model_kwargs(torch.float64)


def span(tokens: MemoryTokens, kind: Kind) -> list[int]:
    """The ids of one invocation."""
    return [tokens.invoke[kind], *[tokens.placeholder] * tokens.latents[kind], tokens.end[kind]]


def extended(kwargs: dict[str, Any], answers: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The keywords of one call over prompts and their answers, all of one length."""
    added = torch.tensor(answers)
    longer = {**kwargs, "input_ids": torch.cat((kwargs["input_ids"], added), 1)}
    longer["attention_mask"] = torch.cat((kwargs["attention_mask"], torch.ones_like(added)), 1)
    if "mm_token_type_ids" in kwargs:
        longer["mm_token_type_ids"] = torch.cat((kwargs["mm_token_type_ids"], torch.zeros_like(added)), 1)
    return longer


def positions_of(model: PreTrainedModel, kwargs: dict[str, Any]) -> Tensor:
    """The family's own position ids of a whole batch, [B, S] or [4, B, S]."""
    own: dict[str, Any] = {name: value for name, value in kwargs.items() if name != "positions"}
    positions: Tensor = model._prepare_position_ids_for_generation(kwargs["input_ids"], own)
    return positions


def step_kwargs(whole: dict[str, Any], positions: Tensor, columns: slice) -> dict[str, Any]:
    """The keywords of a later call that feeds these columns of `whole`, images aside."""
    last = columns.stop
    kwargs = {"input_ids": whole["input_ids"][:, columns], "position_ids": positions[..., columns]}
    kwargs["attention_mask"] = whole["attention_mask"][:, :last]
    if "mm_token_type_ids" in whole:
        kwargs["mm_token_type_ids"] = whole["mm_token_type_ids"][:, columns]
    return kwargs


@torch.no_grad()
def decoded(model: Any, whole: dict[str, Any], prompt_length: int, cache: Any = None) -> tuple[Tensor, Any]:
    """The logits [B, S, V] of `whole`, its first columns in one call and each of the others in its own; and the
    cache."""
    positions = positions_of(model, whole)
    first = {**whole, **step_kwargs(whole, positions, slice(0, prompt_length))}
    output = model(**first, past_key_values=cache, use_cache=True)
    logits = [output.logits]
    for column in range(prompt_length, whole["input_ids"].shape[1]):
        step = step_kwargs(whole, positions, slice(column, column + 1))
        output = model(**step, past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits)
    return torch.cat(logits, 1), output.past_key_values


@dataclass(frozen=True)
class PlainForward:
    """What the plain model makes of a row into whose embeddings latents were put."""

    logits: Tensor
    """[S, V]."""
    last_hidden_states: Tensor
    """[S, d]."""
    is_visual: Tensor
    """bool [S]."""


@torch.no_grad()
def plain_forward(pair: VisMemPair, alone: dict[str, Any], latents: Sequence[Tensor]) -> PlainForward:
    """One forward of the plain model over one row's embeddings, into which `latents` are put, [N, d] for each
    invocation. The rest of the embeddings, image features and positions are the plain model's own, taken where they
    enter its decoder for the same row with words in the places of memory tokens."""
    source, tokens = pair.source, pair.tokens
    (ids,) = alone["input_ids"]
    is_memory = torch.isin(ids, torch.tensor(tokens.ids))
    worded: dict[str, Any] = {**alone, "input_ids": torch.where(is_memory, 5, ids)[None]}
    worded["position_ids"] = positions_of(source, worded)
    described = family(source.config.model_type)
    decoder = source.get_submodule(described.text_model)
    entering: dict[str, Any] = {}
    hook = decoder.register_forward_pre_hook(lambda module, args, kwargs: entering.update(kwargs), with_kwargs=True)
    source(**worded, use_cache=False)
    hook.remove()
    embeds = entering["inputs_embeds"].clone()
    embeds[0, is_memory] = pair.model.get_input_embeddings().weight[ids[is_memory]]
    is_latent = ids == tokens.placeholder
    embeds[0, is_latent] = torch.cat([embeds[0, :0], *latents])[: int(is_latent.sum())]
    hidden_states = decoder(**{**entering, "inputs_embeds": embeds}).last_hidden_state[0]
    visual = torch.isin(ids, torch.tensor(described.visual_token_ids(source.config)))
    return PlainForward(source.lm_head(hidden_states), hidden_states, visual)


def ordinary(tokens: MemoryTokens, logits: Tensor) -> Tensor:
    """The logits [..., V] without those of memory tokens, whose rows the plain model does not have."""
    keep = torch.ones(logits.shape[-1], dtype=torch.bool)
    keep[list(tokens.ids)] = False
    return logits[..., keep]
