"""CoMemo's mixin layer as one operator, and its memory projection as another."""

from typing import Any

import torch
from torch import Tensor

from exporters.operators._gradient import register_recomputed
from surgeon.memory.mixin import mixin as reference
from surgeon.memory.mixin import project


@torch.library.custom_op("surgeon::mixin", mutates_args=())
def mixin(
    hidden_states: Tensor,
    keys: Tensor,
    values: Tensor,
    memory_mask: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm: Tensor,
    q_proj: Tensor,
    o_proj: Tensor,
    attn_gate: Tensor,
    ffn_norm: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    ff_gate: Tensor,
    eps: float,
) -> Tensor:
    """`surgeon.memory.mixin.mixin`."""
    return reference(
        hidden_states, keys, values, memory_mask, cos, sin, norm, q_proj, o_proj, attn_gate, ffn_norm, gate_proj,
        up_proj, down_proj, ff_gate, eps,
    ).contiguous()  # fmt: skip


@mixin.register_fake
def _(hidden_states: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


register_recomputed(mixin, reference)


@torch.library.custom_op("surgeon::mixin_memory", mutates_args=())
def mixin_memory(
    visual_embeds: Tensor, cos: Tensor, sin: Tensor, norm: Tensor, k_proj: Tensor, v_proj: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Visual embeddings [B, M, d] and angles [B, M, hd / 2] -> rotated keys, values [B, H, M, hd]."""
    return memory_reference(visual_embeds, cos, sin, norm, k_proj, v_proj, eps)


def memory_reference(
    visual_embeds: Tensor, cos: Tensor, sin: Tensor, norm: Tensor, k_proj: Tensor, v_proj: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    keys, values = project(visual_embeds, cos, sin, norm, k_proj, v_proj, eps)
    return keys.contiguous(), values.contiguous()


@mixin_memory.register_fake
def _(visual_embeds: Tensor, cos: Tensor, sin: Tensor, norm: Tensor, k_proj: Tensor, v_proj: Tensor, eps: float) -> Any:
    head_dim = 2 * cos.shape[-1]
    shape = (visual_embeds.shape[0], k_proj.shape[0] // head_dim, visual_embeds.shape[1], head_dim)
    return visual_embeds.new_empty(shape), visual_embeds.new_empty(shape)


register_recomputed(mixin_memory, memory_reference)
