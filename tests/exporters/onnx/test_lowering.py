"""Operators of exported graphs compute in ONNX what they do in torch."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor, nn

from exporters.onnx.trace import Program, placeholder
from surgeon import ops


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0, 4.0]))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, 1e-3)


def test_a_norm_of_small_values_has_its_models_epsilon() -> None:
    norm, x = Norm(), torch.tensor([[[0.01, 0.02, -0.03, 0.04]]])
    expected = norm(x).detach().numpy()
    inputs = {"x": placeholder("B", "S", 4, dtype=torch.float32)}
    model = Program.of(Norm().to("meta"), inputs, ["y"]).trace()
    model.graph.initializers["weight"].const_value = ir.tensor(norm.weight.detach().numpy(), name="weight")
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected, rtol=1e-5)
