"""CoMemo's mixin layer: the authors' numbers, and what it does where there is nothing to see."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from golden import published_mixin
from surgeon.memory.mixin import Mixin
from surgeon.memory.rms_norm import RMSNorm
from surgeon.memory.rotary import Rope


def test_block_equals_the_authors() -> None:
    block, tensors = published_mixin()
    assert sum(p.numel() for p in block.parameters()) == 41090
    keys, values = block.project(tensors["input.visual_embeds"], block.rope(tensors["input.media_position_ids"][None]))
    output = block.attend(
        tensors["input.hidden_states"],
        keys,
        values,
        torch.ones(1, 12, dtype=torch.bool),
        None,
        block.rope(tensors["input.text_position_ids"][None]),
    )
    torch.testing.assert_close(output, tensors["output.hidden_states"], atol=1e-5, rtol=0)


def trained_block(seed: int = 0) -> Mixin:
    block = Mixin(24, num_heads=3, intermediate_size=40, rope=Rope(8, 1e4), eps=1e-6)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return block


@pytest.fixture
def block() -> Mixin:
    return trained_block()


def run(block: Mixin, hidden_states: Tensor, visual: Tensor, mask: Tensor, first: int = 9) -> Tensor:
    """Text positions follow `first`; the visual tokens have 0, 1, ..."""
    slots, tokens = torch.arange(visual.shape[1]), first + torch.arange(hidden_states.shape[1])
    keys, values = block.project(visual, block.rope(slots.expand(1, len(visual), -1)))
    output: Tensor = block.attend(
        hidden_states, keys, values, mask, None, block.rope(tokens.expand(1, len(hidden_states), -1))
    )
    return output


def test_rows_without_images_are_left_exactly_as_they_are(block: Mixin) -> None:
    hidden_states, visual = torch.randn(2, 5, 24), torch.randn(2, 7, 24)
    mask = torch.tensor([[True] * 7, [False] * 7])
    output = run(block, hidden_states, visual, mask)
    assert torch.equal(output[1], hidden_states[1])
    assert not torch.allclose(output[0], hidden_states[0], atol=0.1)


def test_padding_of_the_memory_does_not_matter(block: Mixin) -> None:
    """In fp64, because sums over other shapes are added up in another order, which in fp32 comes to about 1e-6."""
    block.double()
    hidden_states, visual = (torch.randn(1, length, 24, dtype=torch.float64) for length in (5, 7))
    mask = torch.arange(7)[None] < 4
    alone = run(block, hidden_states, visual[:, :4], mask[:, :4])
    torch.testing.assert_close(run(block, hidden_states, visual, mask), alone, atol=1e-6, rtol=0)


def test_tokens_of_one_row_may_see_different_images(block: Mixin) -> None:
    """Packed samples: the mask has a row for each token. The second sample sees nothing. In fp64, as above."""
    block.double()
    hidden_states, visual = (torch.randn(1, length, 24, dtype=torch.float64) for length in (5, 7))
    seen = torch.zeros(1, 5, 7, dtype=torch.bool)
    seen[0, :3] = True
    output = run(block, hidden_states, visual, seen)
    assert torch.equal(output[:, 3:], hidden_states[:, 3:])
    alone = run(block, hidden_states[:, :3], visual, torch.ones(1, 7, dtype=torch.bool))
    torch.testing.assert_close(output[:, :3], alone, atol=1e-6, rtol=0)


def test_only_distances_count(block: Mixin) -> None:
    hidden_states, visual, mask = torch.randn(1, 3, 24), torch.randn(1, 4, 24), torch.ones(1, 4, dtype=torch.bool)
    near, far = (run(block, hidden_states, visual, mask, first) for first in (4, 40))
    assert not torch.allclose(near, far, atol=1e-3)
    keys, values = block.project(visual, block.rope(torch.arange(36, 40)[None, None]))
    shifted = block.attend(hidden_states, keys, values, mask, None, block.rope(torch.arange(40, 43)[None, None]))
    torch.testing.assert_close(shifted, near, atol=1e-4, rtol=0)


def test_each_frequency_turns_with_its_axis() -> None:
    rope = Rope(8, 1e4, axes=[0, 1, 2, 1])
    cos, _ = rope(torch.tensor([[[3]], [[5]], [[7]]]))
    angles = torch.tensor([3.0, 5.0, 7.0, 5.0]) * rope.inv_freq()
    torch.testing.assert_close(cos[0, 0], angles.cos())
    plain, _ = rope(torch.tensor([[[3]]]))  # text that was given one axis alone
    torch.testing.assert_close(plain[0, 0], (3 * rope.inv_freq()).cos())


def test_its_norms_have_the_recorded_epsilon() -> None:
    """Which need not be the backbone's."""
    options = {"num_heads": 3, "head_dim": 8, "intermediate": 40, "rope_theta": 1e4, "eps": 1e-3}
    block = Mixin.from_config(SimpleNamespace(hidden_size=24, rms_norm_eps=1e-6), options)
    norms = [module for module in block.modules() if isinstance(module, RMSNorm)]
    assert norms and block.eps == 1e-3 and all(norm.eps == 1e-3 for norm in norms)
