"""The mixin layer's operators by fused kernels, and the form in which a graft takes them."""

from typing import Any

from torch import Tensor

from exporters.kernels.support import fits
from exporters.operators.mixin import mixin, mixin_memory
from surgeon.memory.fused import FusedForm
from surgeon.memory.mixin import Mixin
from surgeon.memory.reference import named
from surgeon.memory.rotary import Rotary


@mixin.register_kernel("cuda")
def fused(*arguments: Any) -> Tensor:
    """By fused kernels, or the reference implementation where they do not take the shapes. Arguments as the
    operator's."""
    by_name = named(Mixin.reference, arguments)
    if not fits("mixin", by_name["keys"].shape[3], by_name):
        output: Tensor = Mixin.reference(**by_name)
        return output
    from exporters.kernels import mixin as kernels  # needs Triton
    from exporters.kernels.cuda._run import run

    (output,) = run(kernels.chain(by_name["eps"]), by_name)
    return output


@mixin_memory.register_kernel("cuda")
def fused_memory(*arguments: Any) -> tuple[Tensor, ...]:
    """By fused kernels, or the reference implementation where they do not take the shapes."""
    by_name = named(Mixin.memory_reference, arguments)
    head_dim = 2 * by_name["cos"].shape[-1]
    if not fits("mixin", head_dim, by_name):
        keys_and_values: tuple[Tensor, ...] = Mixin.memory_reference(**by_name)
        return keys_and_values
    from exporters.kernels import mixin as kernels  # needs Triton
    from exporters.kernels.cuda._run import run

    return run(kernels.memory_chain(by_name["eps"], head_dim), by_name)


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
        residual: Tensor | None,
    ) -> Tensor:
        assert rotary is not None and residual is None  # it stands in front of a layer
        return mixin(hidden_states, keys, values, memory_mask, *rotary, *graft.weights(), graft.eps)

    def project(self, graft: Mixin, visual_embeds: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        assert rotary is not None
        return mixin_memory(visual_embeds, *rotary, *graft.memory_weights(), graft.eps)


FORM: FusedForm = _Form()
