"""Bool masks over a memory become numbers that are added; the result is the same."""

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from exporters.tensorrt.rewrites import AdditiveMask
from small_graphs import cached_attention, op_types, run

GRAPH = """
<ir_version: 10, opset_import: ["": 24]>
graph (DTYPE[B, 4, S, 8] q, DTYPE[B, 2, M, 8] k, DTYPE[B, 2, M, 8] v, bool[B, M] memory_mask)
    => (DTYPE[B, 4, S, 8] y, DTYPE[B, 4, S, 8] z) {
    shape = Constant <value_ints = [0, 1, 1, -1]> ()
    flipped = Not (memory_mask)
    seen = Not (flipped)
    mask = Reshape (seen, shape)
    one = Constant <value_ints = [1]> ()
    length = Shape <start = 2, end = 3> (q)
    size = Concat <axis = 0> (one, one, length, one)
    expanded = Expand (mask, size)
    y = Attention (q, k, v, expanded)
    z = Attention <scale = 0.2> (q, k, v, expanded)
}
"""


def graph(dtype: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(GRAPH.replace("DTYPE", dtype)))


@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_the_same_numbers(dtype: str) -> None:
    kind = {"float": np.float32, "float16": np.float16}[dtype]
    rng = np.random.default_rng(0)
    shapes = {"q": (2, 4, 3, 8), "k": (2, 2, 5, 8), "v": (2, 2, 5, 8)}
    feeds = {name: (rng.standard_normal(shape) * 3).astype(kind) for name, shape in shapes.items()}
    feeds["memory_mask"] = np.array([[1, 0, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=bool)
    model, want = graph(dtype), run(graph(dtype), feeds)
    rewrite = AdditiveMask()
    assert rewrite(model).modified and rewrite.replaced == 2
    assert op_types(model).count("Where") == 1, "one for both"
    for a, b in zip(run(model, feeds), want, strict=True):
        assert np.abs(a.astype(float) - b.astype(float)).max() < {"float": 1e-6, "float16": 2e-3}[dtype]
    assert not AdditiveMask()(model).modified


@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_a_row_that_sees_nothing_stays_finite(dtype: str) -> None:
    """A row without images: minus infinity everywhere would make its softmax NaN, and 0 times NaN is NaN."""
    kind = {"float": np.float32, "float16": np.float16}[dtype]
    rng = np.random.default_rng(1)
    shapes = {"q": (2, 4, 3, 8), "k": (2, 2, 5, 8), "v": (2, 2, 5, 8)}
    feeds = {name: rng.standard_normal(shape).astype(kind) for name, shape in shapes.items()}
    feeds["memory_mask"] = np.array([[0, 0, 0, 0, 0], [1, 0, 0, 1, 1]], dtype=bool)
    model, want = graph(dtype), run(graph(dtype), feeds)
    AdditiveMask()(model)
    for a, b in zip(run(model, feeds), want, strict=True):
        assert np.isfinite(a.astype(float)).all()
        assert np.abs(a[1].astype(float) - b[1].astype(float)).max() < {"float": 1e-6, "float16": 2e-3}[dtype]


@pytest.mark.parametrize("dtype", ["float", "float16", "bfloat16"])
def test_each_dtype_has_its_own_lowest_finite_number(dtype: str) -> None:
    model = graph(dtype)
    AdditiveMask()(model)
    lowest = next(v for n, v in model.graph.initializers.items() if "lowest" in n).const_value
    assert lowest is not None and lowest.dtype == ir.DataType[dtype.upper()]
    value = lowest.numpy()
    assert value == ml_dtypes.finfo(value.dtype).min


def test_the_mask_over_a_cache_and_numbers_stay() -> None:
    assert not AdditiveMask()(cached_attention()).modified
    text = GRAPH.replace("bool[B, M] memory_mask", "float16[B, M] memory_mask").replace("DTYPE", "float16")
    text = text.replace("flipped = Not (memory_mask)\n    seen = Not (flipped)", "seen = Identity (memory_mask)")
    assert not AdditiveMask()(ir.from_proto(onnx.parser.parse_model(text))).modified
