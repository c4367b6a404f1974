"""Islands of fp32 in an fp16 graph, around values that fp16 cannot hold."""

from collections.abc import Collection

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, ShapeInferencePass

from exporters.calibration.value_origins import ValueOrigin, value_origins
from exporters.onnx.precision.float32_nodes import MOVES_DATA, compute_in_float32
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
        value_names = {str(value.name) for node in model.graph for value in node.outputs}
        calls = [node for node in model.graph if node.op_identifier() in model.functions]
        touched = {str(v.name) for node in calls for v in (*node.inputs, *node.outputs) if v is not None}
        return self.names <= value_names and not self.names & touched

    def _closure(self, graph: ir.Graph) -> set[ir.Value]:
        """The values in question, and those that are the same numbers moved."""
        where = value_origins(graph)
        origins: dict[ir.Value, str] = {}
        for node in graph:
            read = [origins[value] for value in node.inputs if value is not None and value in origins]
            if read and node.op_type in _FUSED:
                raise BundleError(_refusal(where[read[0]], f"{node.op_type} reads it"))
            for value in node.outputs:
                moved = read if node.op_type in MOVES_DATA else []
                named = [str(value.name)] if value.name in self.names else []
                if value.dtype != ir.DataType.FLOAT16 or not (origin := [*named, *moved]):
                    continue
                if value.is_graph_output() or node.op_type in _FUSED:
                    raise BundleError(_refusal(where[origin[0]], f"it leaves {graph.name}.onnx or attention"))
                origins[value] = origin[0]
        if missing := self.names - set(origins.values()):
            raise BundleError(f"{graph.name} has no fp16 value named {sorted(missing)[0]!r}; export the bundle again")
        return set(origins)


def _refusal(origin: ValueOrigin, reason: str) -> str:
    return (
        f"{origin.layer} ({origin.operator}) would overflow fp16 and cannot be fp32: {reason}, and attention, caches "
        "and what goes from graph to graph are of the bundle's dtype; export with --dtype bf16"
    )
