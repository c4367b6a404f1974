"""The heads of a query are known where the graph computes them, and nothing else changes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from exporters.tensorrt.rewrites import StaticHeads
from small_graphs import op_types, run, session

GRAPH = """
<ir_version: 10, opset_import: ["": 24]>
graph (float16[B, S, 24] x, float16[48, 24] weight, float16[B, 2, M, 8] keys, float16[B, 2, M, 8] values)
    => (float16[B, H, S, 8] y) {
    rows = Flatten <axis = 2> (x)
    projected = Gemm <transB = 1> (rows, weight)
    leading = Shape <start = 0, end = 2> (x)
    minus = Constant <value_ints = [-1]> ()
    head_dim = Shape <start = 3, end = 4> (keys)
    shape = Concat <axis = 0> (leading, minus, head_dim)
    by_head = Reshape (projected, shape)
    query = Transpose <perm = [0, 2, 1, 3]> (by_head)
    y = Attention (query, keys, values)
}
"""


def graph(text: str = GRAPH) -> ir.Model:
    model = ir.from_proto(onnx.parser.parse_model(text))
    # without shapes between the nodes, as inlining leaves them
    return model


def feeds(batch: int = 2, length: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"x": (batch, length, 24), "weight": (48, 24), "keys": (batch, 2, 5, 8), "values": (batch, 2, 5, 8)}
    return {name: rng.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()}


def test_the_same_numbers_with_one_more_reshape() -> None:
    model, want = graph(), {size: run(graph(), feeds(*size)) for size in ((1, 1), (2, 3))}
    result = StaticHeads()
    assert result(model).modified and result.replaced == 1
    assert op_types(model).count("Reshape") == 2
    (pin,) = [value for name, value in model.graph.initializers.items() if name.startswith("tensorrt_")]
    assert pin.const_value is not None and list(pin.const_value.numpy()) == [0, 0, 6, 8]
    for size, outputs in want.items():
        assert np.array_equal(run(model, feeds(*size))[0], outputs[0])
    assert not StaticHeads()(model).modified, "once is enough"


def test_a_number_that_does_not_fit_runs_nothing() -> None:
    """Were the derived number wrong, it would be an error and no other result."""
    model = graph()
    StaticHeads()(model)
    (pin,) = [value for name, value in model.graph.initializers.items() if name.startswith("tensorrt_")]
    pin.const_value = ir.tensor(np.array([0, 0, 3, 8], dtype=np.int64), name=pin.name)
    ort_session = session(model)
    with pytest.raises(Exception, match="cannot be reshaped"):
        ort_session.run(None, feeds())


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(
            "Concat <axis = 0> (leading, minus, head_dim)", "Concat <axis = 0> (leading, minus, head_dim)"
        ).replace(
            "projected = Gemm <transB = 1> (rows, weight)",
            "turned = Transpose (weight)\n    projected = MatMul (rows, turned)",
        ),
        lambda text: text.replace("float16[B, 2, M, 8] keys", "float16[B, 2, M, D] keys"),
    ],
    ids=["no Gemm", "head size unknown"],
)
def test_what_it_does_not_know_stays(change: Callable[[str], str]) -> None:
    model: Any = graph(change(GRAPH))
    before = op_types(model)
    assert not StaticHeads()(model).modified
    assert op_types(model) == before
