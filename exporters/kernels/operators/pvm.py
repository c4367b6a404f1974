"""Persistent Visual Memory's branch as one operator."""

from typing import Any

import torch
from torch import Tensor

from exporters.kernels.operators._gradient import register_recomputed
from exporters.kernels.support import fits
from surgeon.memory.fused import FusedForm
from surgeon.memory.pvm import PersistentVisualMemory, project
from surgeon.memory.pvm import persistent_visual_memory as plain_definition
from surgeon.memory.rotary import Rotary


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
    """`surgeon.memory.pvm.persistent_visual_memory`, added to `onto` [B, S, d] where it is given; on a GPU by fused
    kernels, where they take the shapes."""
    return _plain(
        hidden_states, keys, values, memory_mask, visual_token_mask, text_proj, input_norm, q_proj, q_norm, o_proj,
        post_attention_norm, gate_proj, up_proj, down_proj, output_proj, alpha, eps, onto,
    )  # fmt: skip


def _plain(*arguments: Any) -> Tensor:
    *given, onto = arguments
    injection = plain_definition(*given)
    return injection if onto is None else onto + injection


@persistent_visual_memory.register_kernel("cuda")
def fused(*arguments: Any) -> Tensor:
    """By fused kernels, or the plain definition where they do not take the shapes. Arguments as the operator's."""
    *tensors, eps, onto = arguments if len(arguments) == 18 else (*arguments, None)
    if not fits("pvm", tensors[1].shape[3], (*tensors, onto)):
        return _plain(*tensors, eps, onto)
    from exporters.kernels import pvm  # needs Triton
    from exporters.kernels.operators._run import run

    (output,) = run(pvm.chain(eps), (*tensors, onto))
    return output


@persistent_visual_memory.register_fake
def _(hidden_states: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


register_recomputed(persistent_visual_memory, _plain)


@torch.library.custom_op("surgeon::pvm_memory", mutates_args=())
def pvm_memory(
    visual_embeds: Tensor, visual_proj: Tensor, k_proj: Tensor, v_proj: Tensor, k_norm: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Visual embeddings [B, M, d] -> keys, values [B, Hm, M, hd]; on a GPU by fused kernels."""
    return _plain_memory(visual_embeds, visual_proj, k_proj, v_proj, k_norm, eps)


def _plain_memory(
    visual_embeds: Tensor, visual_proj: Tensor, k_proj: Tensor, v_proj: Tensor, k_norm: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    keys, values = project(visual_embeds, visual_proj, k_proj, v_proj, k_norm, eps)
    return keys.contiguous(), values.contiguous()


@pvm_memory.register_kernel("cuda")
def fused_memory(*arguments: Any) -> tuple[Tensor, Tensor]:
    """By fused kernels, or the plain definition where they do not take the shapes."""
    *tensors, eps = arguments
    head_dim = tensors[4].shape[0]
    if not fits("pvm", head_dim, tensors):
        return _plain_memory(*arguments)
    from exporters.kernels import pvm  # needs Triton
    from exporters.kernels.operators._run import run

    keys, values = run(pvm.memory_chain(eps, head_dim), tensors)
    return keys, values


@pvm_memory.register_fake
def _(visual_embeds: Tensor, visual_proj: Tensor, k_proj: Tensor, v_proj: Tensor, k_norm: Tensor, eps: float) -> Any:
    head_dim = k_norm.shape[0]
    shape = (visual_embeds.shape[0], k_proj.shape[0] // head_dim, visual_embeds.shape[1], head_dim)
    return visual_embeds.new_empty(shape), visual_embeds.new_empty(shape)


register_recomputed(pvm_memory, _plain_memory)


class _Form:
    devices: tuple[str, ...] = ("cuda",)

    def forward(
        self,
        graft: PersistentVisualMemory,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        memory_mask: Tensor,
        visual_token_mask: Tensor | None,
        rotary: Rotary | None,
        onto: Tensor | None,
    ) -> Tensor:
        return persistent_visual_memory(
            hidden_states, keys, values, memory_mask, visual_token_mask, *graft.weights(), graft.eps, onto
        )

    def project(
        self, graft: PersistentVisualMemory, visual_embeds: Tensor, rotary: Rotary | None
    ) -> tuple[Tensor, Tensor]:
        return pvm_memory(visual_embeds, *graft.memory_weights(), graft.eps)


FORM: FusedForm = _Form()
