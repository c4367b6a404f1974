"""A graft's function as a model of its own, with its weights inside, for tests."""

import copy

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor, nn

from exporters.onnx import functions
from exporters.onnx.assembly import single
from exporters.onnx.trace import Program, placeholder
from surgeon.memory.graft import Graft

NAMES = ("hidden_states", "keys", "values", "memory_mask", "visual_token_mask", "cos", "sin")


class Branch(nn.Module):
    def __init__(self, graft: Graft) -> None:
        super().__init__()
        self.graft = graft

    def forward(
        self,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        memory_mask: Tensor,
        visual_token_mask: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
    ) -> Tensor:
        rotary = None if cos is None or sin is None else (cos, sin)
        return functions.call(self.graft, hidden_states, keys, values, memory_mask, visual_token_mask, rotary)


def exported(graft: Graft, width: int, heads: int, head_dim: int) -> onnx.ModelProto:
    """`graft`, of this hidden size and these heads of keys and values, as a model."""
    dtype = next(graft.parameters()).dtype
    memory = placeholder("B", heads, "M", head_dim, dtype=dtype)
    inputs = {
        "hidden_states": placeholder("B", "S", width, dtype=dtype),
        "keys": memory,
        "values": memory,
        "memory_mask": placeholder("B", "M", dtype=torch.bool),
        "visual_token_mask": placeholder("B", "S", dtype=torch.bool),
    }
    if graft.rope is not None:
        inputs |= dict.fromkeys(("cos", "sin"), placeholder("B", "S", head_dim // 2, dtype=dtype))
    model = single("branch", Program.of(Branch(copy.deepcopy(graft).to("meta")), inputs, ["output"]), {})
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            value.const_value = ir.tensor(graft.get_parameter(name.removeprefix("graft.")).detach().numpy(), name=name)
    return ir.to_proto(model)


def run(model: onnx.ModelProto, *inputs: Tensor) -> np.ndarray:
    """Inputs in the order of `NAMES`."""
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {name: tensor.detach().numpy() for name, tensor in zip(NAMES, inputs, strict=False)}
    found: np.ndarray = session.run(None, feeds)[0]
    return found
