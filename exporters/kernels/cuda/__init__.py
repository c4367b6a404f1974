"""The grafts' operators on a GPU: by fused kernels, behind the same names as their reference implementations.

A model takes them where this project is installed and its tensors are on a GPU: `surgeon.memory.fused` finds them by
the entry points of the group `surgeon.kernels`. `use_fused` says so by hand.
"""

from torch import nn

from surgeon.discovery import Extensions
from surgeon.memory.fused import FusedForm
from surgeon.memory.graft import Graft

_FORMS = Extensions("exporters.kernels.cuda", "FORM", group="surgeon.kernels")


def fused_form_of(kind: str) -> FusedForm | None:
    """Of a kind of graft; None where there is none."""
    return _FORMS.get(kind)


def use_fused(model: nn.Module, on: bool) -> int:
    """Let the grafts of a model take their fused form, or no longer -> how many there are."""
    grafts = [module for module in model.modules() if isinstance(module, Graft)]
    for graft in grafts:
        graft.fused = fused_form_of(graft.kind) if on else None
    return len(grafts)
