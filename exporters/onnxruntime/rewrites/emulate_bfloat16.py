"""bf16 graphs where nothing computes in bf16."""

from collections.abc import Collection, Iterator

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, ShapeInferencePass

from exporters.onnx.precision.float32_nodes import MOVES_DATA
from exporters.onnx.rewrite import Rewrite, is_standard
from exporters.onnxruntime.rewrites._nodes import int_attribute, take_over
from surgeon.errors import BundleError


class EmulateBFloat16(Rewrite):
    """A bf16 graph -> one that ONNX Runtime's CPU provider, which computes nothing in bf16, can run.

    Values become fp32 tensors that hold bf16 numbers: every operator computes in fp32 and its result is rounded to bf16
    (Cast to bf16 and back), as a bf16 device rounds it. Caches, the memory and all other inputs and outputs are fp32
    with it; callers pass inputs that are bf16 numbers. Operators that round more than once inside (RMSNormalization
    before its scale, Attention's softmax) round once here, so a device agrees closely, not in every bit.

    It costs: twice the memory, because weights are cast to fp32 copies when the session loads (embedding tables are
    not: rows are looked up in bf16, then cast); two casts an operator; and nothing of bf16's speed. Functions are
    inlined, so that their inner values are rounded too. It is for checking numbers, not for serving.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Raises BundleError where the type of a function's inner value cannot be inferred."""
        self.replaced = 0
        graph = model.graph
        if not any(value.dtype == ir.DataType.BFLOAT16 for value in _values(graph)):
            return ir.passes.PassResult(model, modified=False)
        if model.functions:
            InlinePass()(model)
        ShapeInferencePass()(model)
        reduced = {value for value in _values(graph) if value.dtype == ir.DataType.BFLOAT16}
        unknown = [str(value.name) for value in _values(graph) if value.dtype is None]
        if unknown:
            raise BundleError(f"the types of {len(unknown)} values, {unknown[0]} the first, cannot be inferred")
        for value in graph.inputs:
            if value in reduced:
                value.dtype = ir.DataType.FLOAT
        for value in [v for v in graph.initializers.values() if v in reduced]:
            table_rows = [use.node for use in value.uses() if use.node.op_type == "Gather" and use.idx == 0]
            for node in table_rows:
                reduced.remove(node.outputs[0])
                self._widen(graph, node.outputs[0], node)
            if len(table_rows) < len(value.uses()):
                self._widen(graph, value, None, but=table_rows)
        for node in list(graph):
            if is_standard(node, "Cast") and int_attribute(node, "to") == ir.DataType.BFLOAT16:
                if node.outputs[0] not in reduced:
                    continue  # made by this pass
                node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
            for output in node.outputs:
                if output not in reduced:
                    continue
                if node.op_type in ("Constant", "ConstantOfShape"):
                    self._widen(graph, output, node)
                    continue
                output.dtype = ir.DataType.FLOAT
                if not _moves_data(node, output):
                    self._round(graph, node, output)
        return ir.passes.PassResult(model, modified=True)

    def _widen(self, graph: ir.Graph, value: ir.Value, producer: ir.Node | None, but: Collection[ir.Node] = ()) -> None:
        """A value that stays bf16 is read as fp32, except by the nodes `but`."""
        cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})
        cast.outputs[0].dtype, cast.outputs[0].shape = ir.DataType.FLOAT, value.shape
        if producer is None:
            graph.insert_before(graph[0], cast)
        else:
            graph.insert_after(producer, cast)
        take_over(value, cast.outputs[0], but=[*but, cast])
        self.replaced += 1

    def _round(self, graph: ir.Graph, node: ir.Node, output: ir.Value) -> None:
        narrow = ir.node("Cast", [output], {"to": int(ir.DataType.BFLOAT16)})
        wide = ir.node("Cast", narrow.outputs, {"to": int(ir.DataType.FLOAT)})
        narrow.outputs[0].dtype, narrow.outputs[0].shape = ir.DataType.BFLOAT16, output.shape
        wide.outputs[0].dtype, wide.outputs[0].shape = ir.DataType.FLOAT, output.shape
        graph.insert_after(node, [narrow, wide])
        take_over(output, wide.outputs[0], but=[narrow])
        self.replaced += 1


def _moves_data(node: ir.Node, output: ir.Value) -> bool:
    if node.op_type == "GroupQueryAttention":
        return output is not node.outputs[0]  # the caches
    return node.op_type in MOVES_DATA


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Every value that is used."""
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from (value for value in node.outputs if value.uses() or value.is_graph_output())
