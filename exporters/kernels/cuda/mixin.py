"""The mixin layer's operators by fused kernels, and the form in which a graft takes them."""

from typing import Any

from torch import Tensor

from exporters.kernels.support import fits
from exporters.operators.mixin import memory_reference, mixin, mixin_memory, reference
from surgeon.memory.fused import FusedForm
from surgeon.memory.mixin import Mixin
from surgeon.memory.rotary import Rotary


@mixin.register_kernel("cuda")
def fused(*arguments: Any) -> Tensor:
    """By fused kernels, or the reference implementation where they do not take the shapes. Arguments as the
    operator's."""
    *tensors, eps = arguments
    others = [*tensors[:4], *tensors[6:]]  # without cos and sin, which are of any dtype
    if not fits("mixin", tensors[1].shape[3], tuple(others)):
        return reference(*arguments)
    from exporters.kernels import mixin as kernels  # needs Triton
    from exporters.kernels.cuda._run import run

    (output,) = run(kernels.chain(eps), tensors)
    return output


@mixin_memory.register_kernel("cuda")
def fused_memory(*arguments: Any) -> tuple[Tensor, Tensor]:
    """By fused kernels, or the reference implementation where they do not take the shapes."""
    *tensors, eps = arguments
    head_dim = 2 * tensors[1].shape[-1]
    if not fits("mixin", head_dim, (tensors[0], *tensors[3:])):
        return memory_reference(*arguments)
    from exporters.kernels import mixin as kernels  # needs Triton
    from exporters.kernels.cuda._run import run

    keys, values = run(kernels.memory_chain(eps, head_dim), tensors)
    return keys, values


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
