"""An fp16 graph as its fp32 twin that also says how large its values become."""

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, ShapeInferencePass

from exporters.calibration.value_origins import ValueOrigin, value_origins
from exporters.onnx.precision.float32_nodes import MOVES_DATA
from surgeon.errors import BundleError

_HALF = ir.DataType.FLOAT16


class Instrument(ir.passes.InPlacePass):
    """Every fp16 value becomes fp32, weights by a Cast where they are used, and the largest absolute value of each that
    is computed (not just moved) an output, a scalar called `<value>.max_abs`. Functions are inlined."""

    def __init__(self) -> None:
        super().__init__()
        self.value_origins: dict[str, ValueOrigin] = {}
        """Where each of the values that are measured is, by its name."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Raises BundleError where the type of a value cannot be inferred."""
        graph = model.graph
        if model.functions:
            InlinePass()(model)
        ShapeInferencePass()(model)
        values = [value for node in graph for value in node.outputs if value.uses() or value.is_graph_output()]
        if unknown := [str(value.name) for value in values if value.dtype is None]:
            raise BundleError(f"the types of {len(unknown)} values, {unknown[0]} the first, cannot be inferred")
        computed = [
            value
            for value in values
            if value.dtype == _HALF and (node := value.producer()) is not None and node.op_type not in MOVES_DATA
        ]
        where = value_origins(graph)
        self.value_origins = {str(value.name): where[str(value.name)] for value in computed}
        self._widen(graph)
        for value in computed:
            self._measure(graph, value)
        return ir.passes.PassResult(model, modified=True)

    def _widen(self, graph: ir.Graph) -> None:
        weights: dict[ir.Value, ir.Value] = {}
        for node in list(graph):
            for index, value in enumerate(node.inputs):
                if value is not None and value.is_initializer() and value.dtype == _HALF:
                    if value not in weights:
                        weights[value] = _weight(graph, node, value)
                    node.replace_input_with(index, weights[value])
            if node.op_type == "Cast" and node.attributes["to"].as_int() == _HALF:
                node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
            for value in node.outputs:
                if value.dtype == _HALF:
                    value.dtype = ir.DataType.FLOAT
        for value in graph.inputs:
            if value.dtype == _HALF:
                value.dtype = ir.DataType.FLOAT

    def _measure(self, graph: ir.Graph, value: ir.Value) -> None:
        magnitude = ir.node("Abs", [value])
        largest = ir.node("ReduceMax", magnitude.outputs, {"keepdims": 0})
        magnitude.outputs[0].dtype = ir.DataType.FLOAT
        output = largest.outputs[0]
        output.name, output.dtype, output.shape = f"{value.name}{SUFFIX}", ir.DataType.FLOAT, ir.Shape([])
        producer = value.producer()
        assert producer is not None
        graph.insert_after(producer, [magnitude, largest])
        graph.outputs.append(output)


def _weight(graph: ir.Graph, node: ir.Node, value: ir.Value) -> ir.Value:
    """A weight in fp32, cast when `node` is about to run.

    Its shape depends on the other inputs of the node: with nothing to wait for, all weights of a model would be
    cast before its first layer runs.
    """
    nodes: list[ir.Node] = []
    source = value
    computed = [other for other in node.inputs if other is not None and other.producer() is not None]
    assert value.shape is not None
    if computed:
        sizes = [int(size) for size in value.shape]  # type: ignore[arg-type]
        nothing = ir.node("Shape", computed[:1], {"start": 0, "end": 0})
        shape = ir.node("Constant", [], {"value_ints": sizes})
        dependent = ir.node("Concat", [*nothing.outputs, *shape.outputs], {"axis": 0})
        moved = ir.node("Reshape", [value, *dependent.outputs])
        for new_node in (nothing, shape, dependent):
            new_node.outputs[0].dtype = ir.DataType.INT64
        moved.outputs[0].dtype, moved.outputs[0].shape = _HALF, value.shape
        nodes, source = [nothing, shape, dependent, moved], moved.outputs[0]
    cast = ir.node("Cast", [source], {"to": int(ir.DataType.FLOAT)})
    cast.outputs[0].dtype, cast.outputs[0].shape = ir.DataType.FLOAT, value.shape
    graph.insert_before(node, [*nodes, cast])
    return cast.outputs[0]


SUFFIX = ".max_abs"
