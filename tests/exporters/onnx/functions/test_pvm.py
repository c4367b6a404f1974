"""Graft functions: their ONNX definitions against the plain torch ones."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from exporters.onnx import functions
from exporters.onnx.assembly import single
from exporters.onnx.trace import Program, placeholder
from surgeon.memory.pvm import PersistentVisualMemory

GOLDEN = Path(__file__).parents[2] / "data" / "pvm_block_a.safetensors"
NAMES = ("hidden_states", "keys", "values", "memory_mask", "visual_token_mask")


class Branch(nn.Module):
    def __init__(self, graft: PersistentVisualMemory) -> None:
        super().__init__()
        self.graft = graft

    def forward(
        self, hidden_states: Tensor, keys: Tensor, values: Tensor, memory_mask: Tensor, visual_token_mask: Tensor
    ) -> Tensor:
        return functions.call(self.graft, hidden_states, keys, values, memory_mask, visual_token_mask)


def exported(graft: PersistentVisualMemory) -> onnx.ModelProto:
    """The branch as a model of one node, with its weights inside."""
    dtype = graft.alpha.dtype
    meta = PersistentVisualMemory(
        graft.output_proj.out_features,
        graft.text_proj.out_features,
        graft.gate_proj.out_features,
        graft.head_dim,
        graft.num_key_value_heads,
        graft.eps,
    ).to("meta", dtype)
    memory = placeholder("B", graft.num_key_value_heads, "M", graft.head_dim, dtype=dtype)
    inputs = {
        "hidden_states": placeholder("B", "S", graft.output_proj.out_features, dtype=dtype),
        "keys": memory,
        "values": memory,
        "memory_mask": placeholder("B", "M", dtype=torch.bool),
        "visual_token_mask": placeholder("B", "S", dtype=torch.bool),
    }
    model = single("branch", Program.of(Branch(meta), inputs, ["injection"]), {})
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            value.const_value = ir.tensor(graft.get_parameter(name.removeprefix("graft.")).detach().numpy(), name=name)
    return ir.to_proto(model)


def run(model: onnx.ModelProto, *inputs: Tensor) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {name: tensor.detach().numpy() for name, tensor in zip(NAMES, inputs, strict=True)}
    return session.run(None, feeds)[0]


def published_block() -> tuple[PersistentVisualMemory, dict[str, Tensor]]:
    names = {
        "text_reducer": "text_proj",
        "vision_reducer": "visual_proj",
        "output_expander": "output_proj",
        "gate_alpha": "alpha",
        "post_attn_norm": "post_attention_norm",
        "cross_attn.": "",
        "mlp.": "",
    }
    tensors = load_file(GOLDEN)
    weights = {}
    for key, tensor in tensors.items():
        if key.startswith("weight."):
            for theirs, ours in names.items():
                key = key.replace(theirs, ours)
            weights[key.removeprefix("weight.")] = tensor
    block = PersistentVisualMemory(64, 32, 96, head_dim=16, num_key_value_heads=1, eps=1e-6)
    block.load_state_dict(weights)
    return block, tensors


def test_the_exported_function_equals_the_authors() -> None:
    block, tensors = published_block()
    model = exported(block)
    onnx.checker.check_model(model, check_custom_domain=False)
    assert [node.op_type for node in model.graph.node] == ["PersistentVisualMemory"]
    visual = tensors["input.visual_embeds"]
    mask = torch.arange(visual.shape[1]) < tensors["input.visual_lengths"][:, None]
    got = run(model, tensors["input.hidden_states"], *block.project(visual), mask, tensors["input.query_is_visual"])
    assert np.abs(got - tensors["output.injection"].numpy()).max() < 1e-5
    assert np.abs(got).max() > 0.1


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-2)])
def test_it_equals_the_definition_where_rows_differ(dtype: torch.dtype, tolerance: float) -> None:
    """Grouped queries, one row full, one padded, one without memory, one all visual; and one token or many."""
    torch.manual_seed(0)
    graft = PersistentVisualMemory(48, 32, 40, head_dim=8, num_key_value_heads=2, eps=1e-6)
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    graft = graft.to(dtype)
    model = exported(graft)
    mask = torch.arange(6) < torch.tensor([6, 2, 0, 4])[:, None]
    keys, values = graft.project(torch.randn(4, 6, 48, dtype=dtype))
    for length in (1, 5):
        hidden_states = torch.randn(4, length, 48, dtype=dtype)
        visual = torch.zeros(4, length, dtype=torch.bool)
        visual[3] = True
        want = graft(hidden_states, keys, values, mask, visual).detach().float().numpy()
        got = run(model, hidden_states, keys, values, mask, visual)
        assert got.dtype == np.float16 if dtype == torch.float16 else np.float32
        assert np.abs(got - want).max() < tolerance
        assert (got[2:] == 0).all() and np.abs(got[:2]).min(axis=(1, 2)).max() > 0
