"""A graft's function as a model of its own, with its weights inside, for tests."""

import copy
from typing import Any

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
from surgeon.memory.mixin import Mixin
from surgeon.memory.pvm import PersistentVisualMemory
from surgeon.memory.rotary import Rope
from surgeon.memory.visibility import Visibility

WIDTH, HEAD_DIM, SLOTS = 48, 32, 6
"""Of the grafts and memories made here."""
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


def exported(graft: Graft, width: int, heads: int, head_dim: int, visibility: Visibility = "all") -> onnx.ModelProto:
    """`graft`, of this hidden size and these heads of keys and values, as a model, whose mask over the memory is of
    each token where visibility is causal."""
    dtype = next(graft.parameters()).dtype
    memory = placeholder("B", heads, "M", head_dim, dtype=dtype)
    inputs = {
        "hidden_states": placeholder("B", "S", width, dtype=dtype),
        "keys": memory,
        "values": memory,
        "memory_mask": placeholder(*(("B", "M") if visibility == "all" else ("B", "S", "M")), dtype=torch.bool),
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
    output: np.ndarray = session.run(None, feeds)[0]
    return output


def graft_of(kind: str, head_dim: int = HEAD_DIM) -> Graft:
    torch.manual_seed(0)
    graft: Any
    if kind == "pvm":
        graft = PersistentVisualMemory(WIDTH, 2 * head_dim, 40, head_dim=head_dim, num_key_value_heads=1, eps=1e-6)
    else:
        graft = Mixin(WIDTH, 2, 40, Rope(head_dim, 1e4), 1e-5)
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    randomised: Graft = graft
    return randomised


def model_of(kind: str, added: str = "", head_dim: int = HEAD_DIM, visibility: Visibility = "all") -> ir.Model:
    """`added`: its result is added to another input, "stream", which comes "first" or "last"."""
    heads = 1 if kind == "pvm" else 2
    model = ir.from_proto(exported(graft_of(kind, head_dim), WIDTH, heads, head_dim, visibility))
    if added:
        (old,) = model.graph.outputs
        stream = ir.Value(name="stream", shape=old.shape, type=old.type)
        add = ir.node("Add", [stream, old] if added == "first" else [old, stream], name="add")
        add.outputs[0].name, add.outputs[0].shape, add.outputs[0].type = "sum", old.shape, old.type
        model.graph.append(add)
        model.graph.inputs.append(stream)
        model.graph.outputs[0] = add.outputs[0]
    return model


def causal(mask: Tensor, length: int) -> Tensor:
    """A mask bool [B, M] for so many tokens each, [B, S, M]: slot after slot comes into sight from the second token on;
    a single token, as in decoding, sees them all."""
    if length == 1:
        return mask[:, None]
    slots, tokens = torch.arange(mask.shape[1]), torch.arange(length)[:, None]
    return mask[:, None] & (slots * (length - 1) < tokens * mask.shape[1])


@torch.no_grad()
def inputs_of(
    kind: str, length: int, head_dim: int = HEAD_DIM, visibility: Visibility = "all"
) -> dict[str, np.ndarray]:
    """One row full, one padded, one without memory, one all visual."""
    torch.manual_seed(length)
    mask = torch.arange(SLOTS) < torch.tensor([SLOTS, 2, 0, 4])[:, None]
    if visibility == "causal":
        mask = causal(mask, length)
    visual = torch.zeros(4, length, dtype=torch.bool)
    visual[3] = True
    heads = 1 if kind == "pvm" else 2
    memory = [torch.randn(4, heads, SLOTS, head_dim) for _ in range(2)]
    angles = torch.randn(4, length, head_dim // 2)
    tensors: list[Tensor] = [torch.randn(4, length, WIDTH), *memory, mask, visual, angles.cos(), angles.sin()]
    feeds = dict(zip(NAMES, tensors, strict=True)) | {"stream": torch.randn(4, length, WIDTH)}
    return {name: tensor.numpy() for name, tensor in feeds.items()}
