"""From a module on the meta device to a graph: names, symbolic sizes, operators."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from exporters.onnx.assembly import Assembly, single
from exporters.onnx.trace import Program, parameter_names, placeholder


class Small(nn.Module):
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.register_buffer("scale", torch.empty(6, device="meta"), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.linear(x)
        # a name that the exporter also gives to the value before it
        cos = (y * self.scale).cos()
        return cos.to(torch.float16), y.view(-1, 6)


@pytest.fixture(scope="module")
def program() -> Program:
    module = Small().to("meta")
    inputs = {"x": placeholder("B", "S", 4, dtype=torch.float32)}
    return Program.of(module, inputs, ["cos", "rows"], constants={"scale": torch.arange(6.0)})


def test_sizes_and_values_have_their_names(program: Program) -> None:
    model = program.trace()
    assert [(v.name, list(map(str, v.shape))) for v in model.graph.inputs] == [("x", ["B", "S", "4"])]
    cos, rows = model.graph.outputs
    assert (cos.name, list(map(str, cos.shape))) == ("cos", ["B", "S", "6"])
    assert rows.name == "rows" and str(rows.shape[0]) in ("B*S", "S*B")
    names = [value.name for node in model.graph for value in node.outputs]
    assert len(set(names)) == len(names)
    assert "Identity" not in [node.op_type for node in model.graph]
    assert model.graph.initializers["linear.weight"].const_value is None


def test_parts_share_inputs_and_weights_and_compute(program: Program) -> None:
    """Two instances of one part over one weight: both outputs are there, and what is common is computed once."""
    part = program.trace()
    assembly = Assembly("twice")
    weights = {"linear.weight": "w", "linear.bias": "b"}
    first = assembly.add(part, {"x": "x"}, weights, suffix=".0")
    second = assembly.add(part, {"x": "x"}, weights, suffix=".1")
    model = assembly.finish(["x"], [first["rows"], second["rows"], second["cos"]])
    assert [v.name for v in model.graph.inputs] == ["x"]
    assert [v.name for v in model.graph.outputs] == ["rows.0", "rows.1", "cos.1"]
    assert sum(node.op_type == "Gemm" for node in model.graph) == 1
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(6, 4, generator=generator), torch.randn(6, generator=generator)
    for name, tensor in (("w", weight), ("b", bias)):
        model.graph.initializers[name].const_value = ir.tensor(tensor.numpy(), name=name)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    x = torch.randn(3, 1, 4, generator=generator)
    rows, again, cos = session.run(None, {"x": x.numpy()})
    want = nn.functional.linear(x, weight, bias)
    assert np.abs(rows - want.view(-1, 6).numpy()).max() < 1e-5
    assert np.array_equal(rows, again)
    assert np.abs(cos - (want * torch.arange(6.0)).cos().half().numpy()).max() < 2e-3


def test_initialisers_bear_the_models_names(program: Program) -> None:
    model = nn.ModuleDict({"tower": program.module})
    graph = single("small", program, parameter_names(program.module, model))
    without_values = {name for name, value in graph.graph.initializers.items() if value.const_value is None}
    assert without_values == {"tower.linear.weight", "tower.linear.bias"}
    assert np.array_equal(graph.graph.initializers["scale"].const_value.numpy(), np.arange(6, dtype=np.float32))
