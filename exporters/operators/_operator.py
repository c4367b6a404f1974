"""A reference implementation as an operator of torch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from exporters.operators._gradient import register_recomputed
from surgeon.memory.reference import Reference


def operator(name: str, reference: Reference, fake: Callable[..., Any]) -> Any:
    """`surgeon::<name>`, with the arguments of `reference`, what it computes and its gradient. `fake`: the arguments
    -> empty tensors as it gives them, contiguous."""
    custom_op = torch.library.custom_op(f"surgeon::{name}", reference, mutates_args=())
    custom_op.register_fake(fake)
    register_recomputed(custom_op, reference)
    return custom_op


def like_hidden_states(hidden_states: Tensor, *arguments: Any) -> Tensor:
    """The fake of what reads the memory: [B, S, d]."""
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


def empty_memory(visual_embeds: Tensor, k_proj: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """The fake of what fills the memory: keys and values [B, Hm, M, hd]."""
    shape = (visual_embeds.shape[0], k_proj.shape[0] // head_dim, visual_embeds.shape[1], head_dim)
    return visual_embeds.new_empty(shape), visual_embeds.new_empty(shape)
