"""PVM's ONNX definition against the plain torch one."""

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from golden import DATA, our_name
from graft_graphs import causal, exported, run
from surgeon.memory.pvm import PersistentVisualMemory
from surgeon.memory.visibility import Visibility


def as_model(graft: PersistentVisualMemory, visibility: Visibility = "all") -> onnx.ModelProto:
    return exported(graft, graft.output_proj.out_features, graft.num_key_value_heads, graft.head_dim, visibility)


def published_block() -> tuple[PersistentVisualMemory, dict[str, Tensor]]:
    tensors = load_file(DATA / "pvm_block_a.safetensors")
    weights = {our_name(k.removeprefix("weight.")): t for k, t in tensors.items() if k.startswith("weight.")}
    block = PersistentVisualMemory(64, 32, 96, head_dim=16, num_key_value_heads=1, eps=1e-6)
    block.load_state_dict(weights)
    return block, tensors


def test_the_exported_function_equals_the_authors() -> None:
    block, tensors = published_block()
    model = as_model(block)
    onnx.checker.check_model(model, check_custom_domain=False)
    assert [node.op_type for node in model.graph.node] == ["PersistentVisualMemory"]
    visual = tensors["input.visual_embeds"]
    mask = torch.arange(visual.shape[1]) < tensors["input.visual_lengths"][:, None]
    got = run(model, tensors["input.hidden_states"], *block.project(visual), mask, tensors["input.query_is_visual"])
    assert np.abs(got - tensors["output.injection"].numpy()).max() < 1e-5
    assert np.abs(got).max() > 0.1


@pytest.mark.parametrize("visibility", ["all", "causal"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-2)])
def test_it_equals_the_definition_where_rows_differ(
    dtype: torch.dtype, tolerance: float, visibility: Visibility
) -> None:
    """Grouped queries, one row full, one padded, one without memory, one all visual; one token or many; an epsilon
    that shows in every norm."""
    torch.manual_seed(0)
    graft = PersistentVisualMemory(48, 32, 40, head_dim=8, num_key_value_heads=2, eps=0.1)
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    graft = graft.to(dtype)
    model = as_model(graft, visibility)
    rows = torch.arange(6) < torch.tensor([6, 2, 0, 4])[:, None]
    keys, values = graft.project(torch.randn(4, 6, 48, dtype=dtype))
    for length in (1, 5):
        hidden_states = torch.randn(4, length, 48, dtype=dtype)
        visual = torch.zeros(4, length, dtype=torch.bool)
        visual[3] = True
        mask = rows if visibility == "all" else causal(rows, length)
        want = graft.attend(hidden_states, keys, values, mask, visual).detach().float().numpy()
        got = run(model, hidden_states, keys, values, mask, visual)
        assert got.dtype == np.float16 if dtype == torch.float16 else np.float32
        assert np.abs(got - want).max() < tolerance
        gets_memory = (mask.any(-1).view(4, -1) & ~visual).numpy()
        assert (got[~gets_memory] == 0).all() and np.abs(got[gets_memory]).max(-1).min() > 0
        assert gets_memory.any(1).tolist() == [True, True, False, False]
        assert gets_memory[:2].all() == (visibility == "all" or length == 1), "the first token stands before all slots"
