"""The grafts' operators on a GPU: by fused kernels, behind the same names as their reference implementations.

A model takes them where this project is installed and its tensors are on a GPU: `surgeon.memory.fused` finds them by
the entry points of the group `surgeon.kernels`. `use_fused` says so by hand.
"""

from torch import nn

from exporters.kernels.of_kind import module_of
from surgeon.memory.fused import FusedForm
from surgeon.memory.graft import Graft


def form_of(kind: str) -> FusedForm | None:
    """Of the file that is named after a kind of graft; None where there is none."""
    found = module_of(__name__, kind)
    return None if found is None else found.FORM


def use_fused(model: nn.Module, on: bool) -> int:
    """Let the grafts of a model take their fused form, or no longer -> how many there are."""
    grafts = [module for module in model.modules() if isinstance(module, Graft)]
    for graft in grafts:
        graft.fused = form_of(graft.kind) if on else None
    return len(grafts)
