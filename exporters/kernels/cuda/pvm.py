"""Persistent Visual Memory's operators by fused kernels, and the form in which a graft takes them."""

from typing import Any

from torch import Tensor

from exporters.kernels.support import fits
from exporters.operators.pvm import persistent_visual_memory, pvm_memory
from surgeon.memory.fused import FusedForm
from surgeon.memory.pvm import PersistentVisualMemory
from surgeon.memory.reference import named
from surgeon.memory.rotary import Rotary


@persistent_visual_memory.register_kernel("cuda")
def fused(*arguments: Any) -> Tensor:
    """By fused kernels, or the reference implementation where they do not take the shapes. Arguments as the
    operator's."""
    by_name = named(PersistentVisualMemory.reference, arguments)
    if not fits("pvm", by_name["keys"].shape[3], by_name):
        output: Tensor = PersistentVisualMemory.reference(**by_name)
        return output
    from exporters.kernels import pvm  # needs Triton
    from exporters.kernels.cuda._run import run

    (output,) = run(pvm.chain(by_name["eps"]), by_name)
    return output


@pvm_memory.register_kernel("cuda")
def fused_memory(*arguments: Any) -> tuple[Tensor, ...]:
    """By fused kernels, or the reference implementation where they do not take the shapes."""
    by_name = named(PersistentVisualMemory.memory_reference, arguments)
    head_dim = by_name["k_norm"].shape[0]
    if not fits("pvm", head_dim, by_name):
        keys_and_values: tuple[Tensor, ...] = PersistentVisualMemory.memory_reference(**by_name)
        return keys_and_values
    from exporters.kernels import pvm  # needs Triton
    from exporters.kernels.cuda._run import run

    return run(pvm.memory_chain(by_name["eps"], head_dim), by_name)


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
        residual: Tensor | None,
    ) -> Tensor:
        return persistent_visual_memory(
            hidden_states, keys, values, memory_mask, visual_token_mask, *graft.weights(), graft.eps, residual
        )

    def project(
        self, graft: PersistentVisualMemory, visual_embeds: Tensor, rotary: Rotary | None
    ) -> tuple[Tensor, Tensor]:
        return pvm_memory(visual_embeds, *graft.memory_weights(), graft.eps)


FORM: FusedForm = _Form()
