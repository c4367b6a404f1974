"""Fused forms of the grafts, where something installed brings them.

A package says so by an entry point of the group `surgeon.kernels`, named after the kind of graft: `surgeon` itself
knows no kernel, and a checkpoint loads and runs the same, if slower, where there is none.
"""

from functools import cache
from importlib.metadata import entry_points
from typing import Any, Protocol

from torch import Tensor

from surgeon.memory.rotary import Rotary


class FusedForm(Protocol):
    """What computes the same as a kind of graft, in fewer launches; arguments as `Graft`'s."""

    devices: tuple[str, ...]
    """The types of device that it is for."""

    def forward(
        self,
        graft: Any,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        memory_mask: Tensor,
        visual_token_mask: Tensor | None,
        rotary: Rotary | None,
        residual: Tensor | None,
    ) -> Tensor:
        """`graft.attend(...)`, added to `residual` [B, S, d] where that is given."""

    def project(self, graft: Any, visual_embeds: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        """`graft.project(...)`."""


@cache
def fused_form(kind: str) -> FusedForm | None:
    """That of a kind of graft; None where none is installed, or what it needs is not."""
    for entry in entry_points(group="surgeon.kernels", name=kind):
        try:
            form: FusedForm = entry.load()
        except ImportError:
            return None
        return form
    return None
