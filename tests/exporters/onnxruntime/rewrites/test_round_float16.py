"""An fp16 graph's overflow shows on a CPU as it would on a device."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from exporters.onnxruntime.rewrites import RoundFloat16

HALF = ir.DataType.FLOAT16


def squares() -> ir.Model:
    """x * x / 1000, in fp16."""
    x, thousand = ir.val("x", HALF, ["N"]), ir.val("c", HALF, [1])
    thousand.const_value = ir.tensor(np.array([1000], dtype=np.float16), name="c")
    square = ir.node("Mul", [x, x])
    quotient = ir.node("Div", [square.outputs[0], thousand])
    for node, name in ((square, "s"), (quotient, "y")):
        node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = name, HALF, ir.Shape(["N"])
    graph = ir.Graph([x], quotient.outputs, nodes=[square, quotient], name="g", opset_imports={"": 24})
    graph.initializers.add(thousand)
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model) -> np.ndarray:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    output: np.ndarray = session.run(None, {"x": np.array([2, 300], dtype=np.float16)})[0]
    return output


def test_onnx_runtime_alone_hides_an_overflow() -> None:
    """Why the rewrite is there; when this fails it can go."""
    assert np.isfinite(run(squares())).all()


def test_every_operator_rounds() -> None:
    model = squares()
    rewrite = RoundFloat16()
    assert rewrite(model).modified and rewrite.replaced == 2
    output = run(model)
    assert output.dtype == np.float16 and np.isinf(output[1]) and output[0] == np.float16(0.004)


def test_graphs_of_other_dtypes_are_left_alone() -> None:
    model = squares()
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.dtype = ir.DataType.FLOAT
    assert not RoundFloat16()(model).modified
