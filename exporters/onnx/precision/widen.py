"""Islands of fp32 in an fp16 graph, around values that fp16 cannot hold."""

from collections.abc import Collection

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, ShapeInferencePass

from exporters.onnx.precision.float32_nodes import MOVES_DATA, compute_in_float32
from exporters.onnx.precision.places import places
from surgeon.errors import BundleError

_FUSED = ("Attention", "TensorScatter")
"""Operators that stay in fp16: without them as they are no backend has fused attention and caches in place."""


class WidenToFloat32(ir.passes.InPlacePass):
    """Values of an fp16 graph become fp32, and with them the operators that make and read them; every other value
    stays as it is.

    `names` are of values of the graph with its functions inlined, as `measure.py` sees it. Functions are inlined where
    one makes, reads or holds such a value: their inner operators cannot be of two precisions otherwise.
    """

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = set(names)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Raises BundleError for a value that must be fp16: one that attention or a cache takes, or that is an input or
        output of the graph."""
        if not self.names:
            return ir.passes.PassResult(model, modified=False)
        if model.functions and not self._stays_outside(model):
            InlinePass()(model)
        ShapeInferencePass()(model)
        wide = self._closure(model.graph)
        nodes = [n for n in model.graph if any(v in wide for v in (*n.inputs, *n.outputs))]
        compute_in_float32(model.graph, nodes, wide, reduced=(ir.DataType.FLOAT16,))
        return ir.passes.PassResult(model, modified=True)

    def _stays_outside(self, model: ir.Model) -> bool:
        """Whether no function has to do with a value in question."""
        known = {str(value.name) for node in model.graph for value in node.outputs}
        calls = [node for node in model.graph if node.op_identifier() in model.functions]
        touched = {str(v.name) for node in calls for v in (*node.inputs, *node.outputs) if v is not None}
        return self.names <= known and not self.names & touched

    def _closure(self, graph: ir.Graph) -> set[ir.Value]:
        """The values in question, and those that are the same numbers moved."""
        where = places(graph)
        wide: set[ir.Value] = set()
        for node in graph:
            inherits = node.op_type in MOVES_DATA and any(value in wide for value in node.inputs)
            for value in node.outputs:
                if value.dtype == ir.DataType.FLOAT16 and (inherits or value.name in self.names):
                    if node.op_type in _FUSED or value.is_graph_output():
                        place = where[str(value.name)]
                        raise BundleError(_refusal(f"{place.layer} ({place.operator}): {value.name}"))
                    wide.add(value)
            for value in node.inputs:
                if value in wide and node.op_type in _FUSED:
                    place = where[str(value.name)]
                    raise BundleError(_refusal(f"{place.layer} ({place.operator}): {value.name}, read by attention"))
        if missing := self.names - {str(value.name) for value in wide}:
            raise BundleError(f"{graph.name} has no fp16 value named {sorted(missing)[0]!r}; export the bundle again")
        return wide


def _refusal(where: str) -> str:
    return (
        f"{where} would overflow fp16, and cannot be fp32: attention, caches, and what goes from graph to graph are of "
        "the bundle's dtype; export with --dtype bf16"
    )
