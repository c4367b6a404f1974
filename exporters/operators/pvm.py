"""Persistent Visual Memory's branch as one operator, and its memory projection as another."""

from typing import Any

import torch
from torch import Tensor

from exporters.operators._gradient import register_recomputed
from surgeon.memory.pvm import persistent_visual_memory as definition
from surgeon.memory.pvm import project


@torch.library.custom_op("surgeon::persistent_visual_memory", mutates_args=())
def persistent_visual_memory(
    hidden_states: Tensor,
    keys: Tensor,
    values: Tensor,
    memory_mask: Tensor,
    visual_token_mask: Tensor | None,
    text_proj: Tensor,
    input_norm: Tensor,
    q_proj: Tensor,
    q_norm: Tensor,
    o_proj: Tensor,
    post_attention_norm: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    output_proj: Tensor,
    alpha: Tensor,
    eps: float,
    onto: Tensor | None = None,
) -> Tensor:
    """`surgeon.memory.pvm.persistent_visual_memory`, added to `onto` [B, S, d] where it is given."""
    return reference(
        hidden_states, keys, values, memory_mask, visual_token_mask, text_proj, input_norm, q_proj, q_norm, o_proj,
        post_attention_norm, gate_proj, up_proj, down_proj, output_proj, alpha, eps, onto,
    )  # fmt: skip


def reference(*arguments: Any) -> Tensor:
    *given, onto = arguments
    injection = definition(*given)
    return injection if onto is None else onto + injection


@persistent_visual_memory.register_fake
def _(hidden_states: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


register_recomputed(persistent_visual_memory, reference)


@torch.library.custom_op("surgeon::pvm_memory", mutates_args=())
def pvm_memory(
    visual_embeds: Tensor, visual_proj: Tensor, k_proj: Tensor, v_proj: Tensor, k_norm: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Visual embeddings [B, M, d] -> keys, values [B, Hm, M, hd]."""
    return memory_reference(visual_embeds, visual_proj, k_proj, v_proj, k_norm, eps)


def memory_reference(
    visual_embeds: Tensor, visual_proj: Tensor, k_proj: Tensor, v_proj: Tensor, k_norm: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    keys, values = project(visual_embeds, visual_proj, k_proj, v_proj, k_norm, eps)
    return keys.contiguous(), values.contiguous()


@pvm_memory.register_fake
def _(visual_embeds: Tensor, visual_proj: Tensor, k_proj: Tensor, v_proj: Tensor, k_norm: Tensor, eps: float) -> Any:
    head_dim = k_norm.shape[0]
    shape = (visual_embeds.shape[0], k_proj.shape[0] // head_dim, visual_embeds.shape[1], head_dim)
    return visual_embeds.new_empty(shape), visual_embeds.new_empty(shape)


register_recomputed(pvm_memory, memory_reference)
