"""Adapters that act in one call alone: what a view computes, and that the module knows nothing of it."""

import copy
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn

from checkpoints import tiny_model
from surgeon.memory.lora import SUFFIX, Adapters, LowRank, adapted, check_targets, is_named, low_rank_product

RANK, ALPHA = 3, 6.0


class Block(nn.Module):
    """Nested, with a layer that no target names and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "out": nn.Linear(8, 8, bias=False)})
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.gain = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn["out"](self.attn["q_proj"](x).tanh()) * self.gain
        output: Tensor = x + self.mlp(x)
        return output


def trained_adapters(block: nn.Module, *targets: str) -> Adapters:
    adapters = Adapters.of({"block": block}, targets, RANK, ALPHA)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.normal_(0, 0.5)
    return adapters


def merged(block: nn.Module, adapters: nn.Module) -> nn.Module:
    """A copy of the block whose weights the adapters are added to, by PEFT's formula."""
    block = copy.deepcopy(block)
    with torch.no_grad():
        for path, low_rank in adapters.named_modules():
            if isinstance(low_rank, LowRank):
                delta = (ALPHA / RANK) * low_rank.expand.weight @ low_rank.reduce.weight
                block.get_submodule(path.removesuffix(SUFFIX)).weight += delta  # type: ignore[operator]
                torch.testing.assert_close(low_rank_product(low_rank), delta)
    return block


@torch.no_grad()
def test_a_view_computes_with_merged_weights() -> None:
    block, x = Block(), torch.randn(5, 8)
    adapters = trained_adapters(block, "q_proj", "mlp.2").get_submodule("block")
    assert sum(isinstance(module, LowRank) for module in adapters.modules()) == 2
    before, state = block(x), copy.deepcopy(block.state_dict())
    output = adapted(block, adapters)(x)
    torch.testing.assert_close(output, merged(block, adapters)(x), atol=1e-5, rtol=1e-5)
    assert (output - before).abs().max() > 0.1
    # and the block is what it was
    assert torch.equal(block(x), before)
    assert all(torch.equal(value, state[name]) for name, value in block.state_dict().items())
    assert not any(isinstance(module, LowRank) for module in block.modules())


def test_a_view_shares_every_parameter() -> None:
    block = Block()
    adapters = trained_adapters(block, "q_proj").get_submodule("block")
    view = adapted(block, adapters)
    own = {id(parameter) for parameter in (*block.parameters(), *adapters.parameters())}
    assert {id(parameter) for parameter in view.parameters()} == own
    assert view.mlp is block.mlp and view.attn["out"] is block.attn["out"]
    view(torch.randn(2, 8)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in (*block.parameters(), *adapters.parameters()))


def test_a_view_is_in_the_mode_of_its_module() -> None:
    block = Block()
    adapters = trained_adapters(block, "q_proj").get_submodule("block")
    assert not adapted(block.eval(), adapters).training and adapted(block.train(), adapters).training


@torch.no_grad()
def test_just_inserted_it_adds_nothing() -> None:
    block, x = Block(), torch.randn(5, 8)
    adapters = Adapters.of({"block": block}, ["q_proj"], RANK, ALPHA)
    for module in adapters.modules():
        if isinstance(module, LowRank):
            initialisers = module.initialisers()
            nn.init.normal_(module.reduce.weight, 0, initialisers["reduce.weight"].std)  # type: ignore[union-attr]
            nn.init.constant_(module.expand.weight, initialisers["expand.weight"].value)  # type: ignore[union-attr]
    assert torch.equal(adapted(block, adapters.get_submodule("block"))(x), block(x))


@pytest.mark.parametrize(
    ("path", "target", "named"),
    [
        ("self_attn.q_proj", "q_proj", True),
        ("self_attn.q_proj", "self_attn.q_proj", True),
        ("q_proj", "q_proj", True),
        ("self_attn.eq_proj", "q_proj", False),
        ("q_proj.inner", "q_proj", False),
    ],
)
def test_a_target_is_the_end_of_a_path(path: str, target: str, named: bool) -> None:
    assert is_named(path, target) is named


@pytest.mark.parametrize(
    ("targets", "unmatched"), [(["q_proj", "k_proj", "v"], "k_proj, v"), (["gain"], "gain"), ([], "anything")]
)
def test_targets_that_are_not_there_are_refused_with_those_that_are(targets: list[str], unmatched: str) -> None:
    with pytest.raises(ValueError) as error:
        check_targets([Block(), Block()], targets)
    assert str(error.value) == f"no linear layer is called {unmatched}; there are attn.out, attn.q_proj, mlp.0, mlp.2"


@pytest.mark.parametrize("model_type", ["qwen3_vl", "internvl"])
@torch.no_grad()
def test_a_layer_that_accelerate_offloads(model_type: str) -> None:
    """Its weights are on the meta device but for the moment in which a module that holds some is called."""
    model: Any = tiny_model(model_type)
    decoder = model.model.language_model
    layer = decoder.layers[1]
    adapters = trained_adapters(layer, "q_proj", "o_proj", "down_proj").get_submodule("block")
    x = torch.randn(1, 6, 64)
    places = torch.arange(6)[None]
    axes = places.expand(3, -1, -1) if model_type == "qwen3_vl" else places
    angles = decoder.rotary_emb(x, axes)
    kwargs = {"position_embeddings": angles, "attention_mask": None}
    plain, expected = layer(x, **kwargs), merged(layer, adapters)(x, **kwargs)
    torch.testing.assert_close(adapted(layer, adapters)(x, **kwargs), expected, atol=1e-5, rtol=1e-5)
    cpu_offload(layer, torch.device("cpu"))
    assert layer.self_attn.q_proj.weight.device.type == "meta"
    torch.testing.assert_close(adapted(layer, adapters)(x, **kwargs), expected, atol=1e-5, rtol=1e-5)
    assert layer.self_attn.q_proj.weight.device.type == "meta"
    assert torch.equal(layer(x, **kwargs), plain)
