"""Grafts as functions of the project's ONNX domain: one node per graft, carrying its definition in standard operators.

A backend that knows the function runs a kernel in its place; any other inlines the definition. Each is the ONNX form
of a plain torch definition in `surgeon/memory`, and must agree with it. A graft's function is the `FUNCTION` of the
file here that bears its kind's name; a graft without one is traced into standard operators.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import onnx_ir as ir
from torch import Tensor

from exporters.onnx.functions._base import DOMAIN, IR_VERSION, OPSET, GraftFunction, op
from surgeon.discovery import Extensions
from surgeon.memory.graft import Graft
from surgeon.memory.rotary import Rotary

__all__ = ["DOMAIN", "IR_VERSION", "OPSET", "call", "definitions", "op", "project", "registry", "translation_table"]


_FUNCTIONS = Extensions("exporters.onnx.functions", "FUNCTION", group="surgeon.functions")


@cache
def registry() -> dict[str, GraftFunction]:
    """Every graft's function, by kind."""
    return _FUNCTIONS.all()


def translation_table() -> dict[Any, Callable[..., Any]]:
    """Torch operator -> a node that calls the ONNX function by name; `definitions` has what it means."""
    return {function.operator: function.translation for function in registry().values()}


def definitions() -> list[ir.Function]:
    """Every function of the domain. The exporter would inline those that are in the model during export."""
    return [function.function for function in registry().values()]


def call(
    graft: Graft,
    hidden_states: Tensor,
    keys: Tensor,
    values: Tensor,
    memory_mask: Tensor,
    visual_token_mask: Tensor,
    rotary: Rotary | None = None,
) -> Tensor:
    """`graft.attend(...)` as its one operator; tensors as `Graft.attend` takes them."""
    function = registry().get(graft.kind)
    if function is not None:
        return function.call(graft, hidden_states, keys, values, memory_mask, visual_token_mask, rotary)
    output: Tensor = graft.attend(hidden_states, keys, values, memory_mask, visual_token_mask, rotary)
    return output


def project(graft: Graft, visual_embeds: Tensor, rotary: Rotary | None = None) -> tuple[Tensor, Tensor]:
    """`graft.project(...)`, written for export where the graft's function says how."""
    function = registry().get(graft.kind)
    return graft.project(visual_embeds, rotary) if function is None else function.project(graft, visual_embeds, rotary)
