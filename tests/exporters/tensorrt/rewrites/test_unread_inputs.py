"""Inputs of which the size alone is asked go; the size is asked of another."""

import numpy as np
import onnx
import onnx_ir as ir

from exporters.tensorrt.rewrites import DropUnreadInputs
from small_graphs import run

GRAPH = """
<ir_version: 10, opset_import: ["": 24]>
graph (bool[B, S] mask, float[A, B] first, float[B, S, 4] x) => (float[N, 4] y, int64[K] s) {
    length = Shape <start = 1, end = 2> (mask)
    rows = Shape <end = -1> (mask)
    four = Constant <value_ints = [4]> ()
    minus = Constant <value_ints = [-1]> ()
    shape = Concat <axis = 0> (minus, four)
    y = Reshape (x, shape)
    f = ReduceSum (first)
    n = Cast <to = 7> (f)
    sum = Add (length, n)
    s = Concat <axis = 0> (sum, rows)
}
"""


def parse(text: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(text))


def test_sizes_come_from_inputs_that_are_read() -> None:
    rng = np.random.default_rng(0)
    feeds = {"first": np.zeros((1, 2), np.float32), "x": rng.standard_normal((2, 3, 4)).astype(np.float32)}
    text = GRAPH.replace("sum = Add (length, n)", "n1 = Reshape (n, minus)\n    sum = Add (length, n1)")
    model, want = parse(text), run(parse(text), feeds | {"mask": np.zeros((2, 3), bool)})
    rewrite = DropUnreadInputs()
    assert rewrite(model).modified and rewrite.replaced == 1
    assert [value.name for value in model.graph.inputs] == ["first", "x"]
    for a, b in zip(run(model, feeds), want, strict=True):
        assert np.array_equal(a, b)


def test_an_input_that_nobody_else_has_a_size_of_stays() -> None:
    model = parse(GRAPH.replace("bool[B, S] mask", "bool[B, Z] mask"))
    assert not DropUnreadInputs()(model).modified
    assert len(model.graph.inputs) == 3


def test_a_size_does_not_move_to_an_input_that_is_not_read_either() -> None:
    text = GRAPH.replace("bool[B, S] mask,", "bool[B, S] mask, bool[Q, S] more,")
    text = text.replace("float[B, S, 4] x)", "float[B, R, 4] x)")
    text = text.replace(
        "n = Cast <to = 7> (f)", "other = Shape <start = 1, end = 2> (more)\n    n = Mul (other, other)"
    )
    model = parse(text)
    DropUnreadInputs()(model)
    assert {"mask", "more"} <= {value.name for value in model.graph.inputs}


def test_several_sizes_at_once_stay() -> None:
    model = parse(GRAPH.replace("Shape <start = 1, end = 2> (mask)", "Shape (mask)"))
    assert not DropUnreadInputs()(model).modified


def test_inputs_that_nothing_uses_go() -> None:
    text = GRAPH.replace("length = Shape <start = 1, end = 2> (mask)", "length = Shape <start = 1, end = 2> (x)")
    model = parse(text.replace("rows = Shape <end = -1> (mask)", "rows = Shape <end = 1> (x)"))
    assert DropUnreadInputs()(model).modified
    assert [value.name for value in model.graph.inputs] == ["first", "x"]
