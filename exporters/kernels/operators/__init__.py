"""Each graft's plain definition and its fused kernels under one operator of torch, chosen by device.

A model takes them where this project is installed and its tensors are on a GPU: `surgeon.memory.fused` finds them by
the entry points of the group `surgeon.kernels`. `use_fused` says so by hand.
"""

from torch import nn

from exporters.kernels.operators import mixin, pvm
from surgeon.memory.graft import Graft

FORMS = {"pvm": pvm.FORM, "mixin": mixin.FORM}


def use_fused(model: nn.Module, on: bool) -> int:
    """Let the grafts of a model take their fused form, or no longer -> how many there are."""
    grafts = [module for module in model.modules() if isinstance(module, Graft)]
    for graft in grafts:
        graft.fused = FORMS.get(graft.kind) if on else None
    return len(grafts)
