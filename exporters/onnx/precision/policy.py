"""Operators that compute in fp32 whatever the graph's dtype is: the part of docs/precision.md that is not already in
the definition of an operator."""

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from exporters.onnx.precision.float32_nodes import REDUCED, compute_in_float32

FLOAT32_OPERATORS = {
    "Softmax": "a sum over thousands of terms: fp16 loses the small ones, bf16 stops counting at 256",
    "Tanh": "of gates, which start at zero: an approximation in half precision may be off by more than a small gate",
}
"""Operator -> why. Attention's softmax is not meant: it is inside one operator, and the backend's kernel's own."""


class Float32Operators(ir.passes.InPlacePass):
    """Casts around the operators of `FLOAT32_OPERATORS`, in the graph and in its functions."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = [n for n in model.graph if n.domain == "" and n.op_type in FLOAT32_OPERATORS]
        if nodes:
            ShapeInferencePass()(model)
        changed = compute_in_float32(model.graph, nodes)
        if any(value.dtype in REDUCED for value in (*model.graph.inputs, *model.graph.outputs)):
            changed += sum(_in_function(function) for function in model.functions.values())
        return ir.passes.PassResult(model, modified=changed > 0)


def _in_function(function: ir.Function) -> int:
    """The same in a function, whose values have no types: cast back by example."""
    nodes = [n for n in function if n.domain == "" and n.op_type in FLOAT32_OPERATORS]
    for node in nodes:
        (value,), (result,) = node.inputs, node.outputs
        wide = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})
        function.insert_before(node, wide)
        node.replace_input_with(0, wide.outputs[0])
        back = ir.node("CastLike", [result, value])
        function.insert_after(node, back)
        for user, index in list(result.uses()):
            if user is not back:
                user.replace_input_with(index, back.outputs[0])
    return len(nodes)
