"""Rewrites of a bundle's standard graphs for TensorRT, in memory: no file of the bundle changes.

Each is an onnx-ir pass that computes what the graph did before; they run in the order of `REWRITES`. `FusedKernels`
goes before them where it is asked for.
"""

from collections.abc import Sequence

import onnx_ir as ir

from exporters.onnx.rewrite import Rewrite
from exporters.tensorrt.rewrites.additive_mask import AdditiveMask
from exporters.tensorrt.rewrites.inline import InlineFunctions
from exporters.tensorrt.rewrites.static_heads import StaticHeads
from exporters.tensorrt.rewrites.unread_inputs import DropUnreadInputs

__all__ = [
    "REWRITES",
    "AdditiveMask",
    "DropUnreadInputs",
    "InlineFunctions",
    "StaticHeads",
    "rewrite",
]

REWRITES: tuple[type[Rewrite], ...] = (InlineFunctions, StaticHeads, AdditiveMask, DropUnreadInputs)


def rewrite(model: ir.Model, first: Sequence[Rewrite] = ()) -> dict[str, int]:
    """Apply `first`, and then every rewrite, to `model` in place -> how many nodes each replaced, by name."""
    replaced = {}
    for graph_rewrite in (*first, *(rewrite_class() for rewrite_class in REWRITES)):
        graph_rewrite(model)
        replaced[type(graph_rewrite).__name__] = graph_rewrite.replaced
    return replaced
