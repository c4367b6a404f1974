"""Persistent Visual Memory's operators by fused kernels, and the form in which a graft takes them."""

from typing import Any

from torch import Tensor

from exporters.kernels.support import fits
from exporters.operators.pvm import memory_reference, persistent_visual_memory, pvm_memory, reference
from surgeon.memory.fused import FusedForm
from surgeon.memory.pvm import PersistentVisualMemory
from surgeon.memory.rotary import Rotary


@persistent_visual_memory.register_kernel("cuda")
def fused(*arguments: Any) -> Tensor:
    """By fused kernels, or the reference implementation where they do not take the shapes. Arguments as the
    operator's."""
    *tensors, eps, onto = arguments if len(arguments) == 18 else (*arguments, None)
    if not fits("pvm", tensors[1].shape[3], (*tensors, onto)):
        return reference(*tensors, eps, onto)
    from exporters.kernels import pvm  # needs Triton
    from exporters.kernels.cuda._run import run

    (output,) = run(pvm.chain(eps), (*tensors, onto))
    return output


@pvm_memory.register_kernel("cuda")
def fused_memory(*arguments: Any) -> tuple[Tensor, Tensor]:
    """By fused kernels, or the reference implementation where they do not take the shapes."""
    *tensors, eps = arguments
    head_dim = tensors[4].shape[0]
    if not fits("pvm", head_dim, tensors):
        return memory_reference(*arguments)
    from exporters.kernels import pvm  # needs Triton
    from exporters.kernels.cuda._run import run

    keys, values = run(pvm.memory_chain(eps, head_dim), tensors)
    return keys, values


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
