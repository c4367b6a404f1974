"""CoMemo's mixin layer as one operator."""

from typing import Any

import torch
from torch import Tensor

from exporters.kernels.operators._gradient import register_recomputed
from exporters.kernels.support import fits
from surgeon.memory.fused import FusedForm
from surgeon.memory.mixin import Mixin, project
from surgeon.memory.mixin import mixin as plain_definition
from surgeon.memory.rotary import Rotary


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
    """`surgeon.memory.mixin.mixin`; on a GPU by fused kernels, where they take the shapes."""
    return plain_definition(
        hidden_states, keys, values, memory_mask, cos, sin, norm, q_proj, o_proj, attn_gate, ffn_norm, gate_proj,
        up_proj, down_proj, ff_gate, eps,
    ).contiguous()  # fmt: skip


@mixin.register_kernel("cuda")
def fused(*arguments: Any) -> Tensor:
    """By fused kernels, or the plain definition where they do not take the shapes. Arguments as the operator's."""
    *tensors, eps = arguments
    others = [*tensors[:4], *tensors[6:]]  # without cos and sin, which are of any dtype
    if not fits("mixin", tensors[1].shape[3], tuple(others)):
        return plain_definition(*arguments)
    from exporters.kernels import mixin  # needs Triton
    from exporters.kernels.operators._run import run

    (output,) = run(mixin.chain(eps), tensors)
    return output


@mixin.register_fake
def _(hidden_states: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


register_recomputed(mixin, plain_definition)


@torch.library.custom_op("surgeon::mixin_memory", mutates_args=())
def mixin_memory(
    visual_embeds: Tensor, cos: Tensor, sin: Tensor, norm: Tensor, k_proj: Tensor, v_proj: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Visual embeddings [B, M, d] and angles [B, M, hd / 2] -> rotated keys, values [B, H, M, hd]; on a GPU by fused
    kernels."""
    return _plain_memory(visual_embeds, cos, sin, norm, k_proj, v_proj, eps)


def _plain_memory(
    visual_embeds: Tensor, cos: Tensor, sin: Tensor, norm: Tensor, k_proj: Tensor, v_proj: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    keys, values = project(visual_embeds, cos, sin, norm, k_proj, v_proj, eps)
    return keys.contiguous(), values.contiguous()


@mixin_memory.register_kernel("cuda")
def fused_memory(*arguments: Any) -> tuple[Tensor, Tensor]:
    """By fused kernels, or the plain definition where they do not take the shapes."""
    *tensors, eps = arguments
    head_dim = 2 * tensors[1].shape[-1]
    if not fits("mixin", head_dim, (tensors[0], *tensors[3:])):
        return _plain_memory(*arguments)
    from exporters.kernels import mixin  # needs Triton
    from exporters.kernels.operators._run import run

    keys, values = run(mixin.memory_chain(eps, head_dim), tensors)
    return keys, values


@mixin_memory.register_fake
def _(visual_embeds: Tensor, cos: Tensor, sin: Tensor, norm: Tensor, k_proj: Tensor, v_proj: Tensor, eps: float) -> Any:
    head_dim = 2 * cos.shape[-1]
    shape = (visual_embeds.shape[0], k_proj.shape[0] // head_dim, visual_embeds.shape[1], head_dim)
    return visual_embeds.new_empty(shape), visual_embeds.new_empty(shape)


register_recomputed(mixin_memory, _plain_memory)


class _Form:
    devices: tuple[str, ...] = ("cuda",)

    def forward(
        self,
        graft: Mixin,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        memory_mask: Tensor,
        visual_token_mask: Tensor | None,
        rotary: Rotary | None,
        onto: Tensor | None,
    ) -> Tensor:
        assert rotary is not None and onto is None  # it stands in front of a layer
        return mixin(hidden_states, keys, values, memory_mask, *rotary, *graft.weights(), graft.eps)

    def project(self, graft: Mixin, visual_embeds: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        assert rotary is not None
        return mixin_memory(visual_embeds, *rotary, *graft.memory_weights(), graft.eps)


FORM: FusedForm = _Form()
