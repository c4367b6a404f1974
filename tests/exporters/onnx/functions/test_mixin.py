"""The mixin layer's ONNX definition against the authors' numbers and the plain torch one."""

import numpy as np
import onnx
import pytest
import torch

from exporters.onnx import functions
from golden import published_mixin
from graft_graphs import causal, exported, run
from surgeon.memory.mixin import Mixin
from surgeon.memory.rotary import Rope
from surgeon.memory.visibility import Visibility


def test_the_exported_function_equals_the_authors() -> None:
    block, tensors = published_mixin()
    model = exported(block, 64, 4, 16)
    onnx.checker.check_model(model, check_custom_domain=False)
    assert [node.op_type for node in model.graph.node] == ["Mixin"]
    visual = tensors["input.visual_embeds"]
    rotary = block.rope(tensors["input.media_position_ids"][None])
    keys, values = functions.project(block, visual, rotary)
    hidden_states, mask = tensors["input.hidden_states"], torch.ones(visual.shape[:2], dtype=torch.bool)
    none = torch.zeros(hidden_states.shape[:2], dtype=torch.bool)
    turned = block.rope(tensors["input.text_position_ids"][None])
    got = run(model, hidden_states, keys, values, mask, none, *turned)
    assert np.abs(got - tensors["output.hidden_states"].numpy()).max() < 1e-5
    assert np.abs(got - hidden_states.numpy()).max() > 0.1


@pytest.mark.parametrize("visibility", ["all", "causal"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-2)])
def test_it_equals_the_definition_where_rows_differ(
    dtype: torch.dtype, tolerance: float, visibility: Visibility
) -> None:
    """One row full, one padded, one without memory; one token or many; several axes of positions; an epsilon that
    shows in every norm."""
    torch.manual_seed(0)
    rope = Rope(8, 1e4, axes=(0, 1, 2, 1))
    graft = Mixin(48, num_heads=3, intermediate_size=40, rope=rope, eps=0.1)
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    graft = graft.to(dtype)
    model = exported(graft, 48, 3, 8, visibility)
    rows = torch.arange(6) < torch.tensor([6, 2, 0])[:, None]
    media = torch.randint(0, 50, (3, 3, 6))
    visual = torch.randn(3, 6, 48, dtype=dtype)
    keys, values = functions.project(graft, visual, rope(media))
    for projected, expected in zip((keys, values), graft.project(visual, rope(media)), strict=True):
        torch.testing.assert_close(projected, expected, atol=tolerance, rtol=0)
    for length in (1, 5):
        hidden_states = torch.randn(3, length, 48, dtype=dtype)
        none = torch.zeros(3, length, dtype=torch.bool)
        mask = rows if visibility == "all" else causal(rows, length)
        rotary = rope(torch.randint(50, 90, (3, 3, length)))
        want = graft.attend(hidden_states, keys, values, mask, None, rotary).detach().float().numpy()
        cos, sin = (part.to(dtype) for part in rotary)
        got = run(model, hidden_states, keys, values, mask, none, cos, sin)
        assert got.dtype == (np.float16 if dtype == torch.float16 else np.float32)
        assert np.abs(got - want).max() < tolerance
        has_memory = mask.any(-1).view(3, -1).expand(3, length).numpy()
        changed = np.abs(got - hidden_states.numpy())
        assert not changed[~has_memory].any(), "a token without memory keeps its value exactly"
        assert changed[has_memory].max(-1).min() > 0.1
        assert has_memory.any(1).tolist() == [True, True, False]
        assert has_memory[:2].all() == (visibility == "all" or length == 1), "the first token stands before all slots"
