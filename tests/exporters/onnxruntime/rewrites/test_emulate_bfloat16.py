from collections.abc import Iterator

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
import torch

from exporters.onnxruntime.rewrites import EmulateBFloat16
from small_graphs import cached_attention, op_types, run

BFLOAT16 = """
<ir_version: 11, opset_import: ["" : 24, "surgeon" : 1]>
graph (int64[N] ids, bfloat16[N, 8] x) => (bfloat16[N, 4] y, bfloat16[N, 8] rows)
<bfloat16[10, 8] table, bfloat16[4, 8] weight, bfloat16[4] scale>
{
    rows = Gather <axis = 0> (table, ids)
    h = Add (rows, x)
    z = Gemm <transB = 1> (h, weight)
    wide = Cast <to = 1> (z)
    angle = Cos (wide)
    narrow = Cast <to = 16> (angle)
    y = surgeon.Twice (narrow, scale)
}
<domain: "surgeon", opset_import: ["" : 24]>
Twice (a, b) => (c)
{
    d = Mul (a, b)
    c = Add (d, a)
}
"""


@pytest.fixture
def bfloat16() -> Iterator[tuple[ir.Model, dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"table": (10, 8), "weight": (4, 8), "scale": (4,)}
    weights = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    proto = onnx.parser.parse_model(BFLOAT16)
    for name, tensor in weights.items():
        raw = tensor.view(torch.uint16).numpy().tobytes()
        proto.graph.initializer.append(
            onnx.helper.make_tensor(name, onnx.TensorProto.BFLOAT16, tensor.shape, raw, raw=True)
        )
    yield ir.from_proto(proto), weights


def test_bfloat16_is_rounded_as_torch_rounds_it(bfloat16: tuple[ir.Model, dict[str, torch.Tensor]]) -> None:
    model, weights = bfloat16
    rewrite = EmulateBFloat16()
    assert rewrite(model).modified and rewrite.replaced > 0
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    ids = torch.tensor([1, 9, 0, 3, 3])
    y, rows = run(model, {"ids": ids.numpy(), "x": x.float().numpy()})
    expected = ((weights["table"][ids] + x) @ weights["weight"].T).float().cos().bfloat16()
    expected = expected * weights["scale"] + expected
    assert y.dtype == rows.dtype == np.float32
    np.testing.assert_array_equal(rows, weights["table"][ids].float().numpy())
    np.testing.assert_array_equal(y, expected.float().numpy())


def test_an_embedding_table_is_not_widened(bfloat16: tuple[ir.Model, dict[str, torch.Tensor]]) -> None:
    model, _ = bfloat16
    EmulateBFloat16()(model)
    table = model.graph.initializers["table"]
    assert [use.node.op_type for use in table.uses()] == ["Gather"]


def test_a_graph_without_bfloat16_is_left_alone() -> None:
    model = cached_attention()
    before = op_types(model)
    rewrite = EmulateBFloat16()
    assert not rewrite(model).modified and rewrite.replaced == 0 and op_types(model) == before
