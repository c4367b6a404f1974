"""Where a graft's fused form comes from, and when it is taken."""

import importlib.metadata
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from exporters.kernels.cuda import mixin, pvm
from surgeon.memory import fused
from surgeon.memory.graft import weight_of
from surgeon.memory.pvm import PersistentVisualMemory


def test_an_installed_project_brings_its_kernels() -> None:
    assert fused.fused_form("pvm") is pvm.FORM
    assert fused.fused_form("mixin") is mixin.FORM
    assert fused.fused_form("a kind of which nobody knows") is None


def test_without_them_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def load(self) -> Any:
            raise ModuleNotFoundError("torch_is_too_old_for_this")

    monkeypatch.setattr(fused, "entry_points", lambda **kwargs: [Broken()])
    fused.fused_form.cache_clear()
    assert fused.fused_form("pvm") is None
    monkeypatch.setattr(fused, "entry_points", lambda **kwargs: importlib.metadata.EntryPoints())
    fused.fused_form.cache_clear()
    assert fused.fused_form("pvm") is None
    fused.fused_form.cache_clear()


class Marked:
    """A form whose answers cannot be mistaken."""

    def __init__(self, *devices: str) -> None:
        self.devices = devices

    def forward(self, graft: Any, hidden_states: Tensor, *rest: Any) -> Tensor:
        return torch.full_like(hidden_states, 7.0)

    def project(self, graft: Any, visual_embeds: Tensor, rotary: Any) -> tuple[Tensor, Tensor]:
        return torch.full((1,), 7.0), torch.full((1,), 8.0)


def test_it_is_taken_on_its_devices_alone_and_never_under_autocast() -> None:
    graft = PersistentVisualMemory(16, 8, 8, head_dim=8, num_key_value_heads=1, eps=1e-6).requires_grad_(False)
    graft.alpha.fill_(0.5)
    embeds = torch.randn(1, 3, 16)
    keys, values = graft.write_memory(embeds)
    rest = (keys, values, torch.ones(1, 3, dtype=torch.bool), None, None)
    plain = graft.read_memory(embeds, *rest)
    graft.fused = Marked("cuda")
    assert torch.equal(graft.read_memory(embeds, *rest), plain)
    assert torch.equal(graft.write_memory(embeds)[0], keys)
    graft.fused = Marked("cuda", "cpu")
    assert bool((graft.read_memory(embeds, *rest) == 7).all())
    assert float(graft.write_memory(embeds)[1]) == 8
    with torch.autocast("cpu", torch.bfloat16):
        assert not bool((graft.read_memory(embeds, *rest) == 7).any())


@pytest.mark.parametrize(
    ("training", "use_dora", "is_fused"),
    [(False, False, True), (True, False, False), (False, True, False), (True, True, False)],
)
def test_an_adapter_that_does_more_than_add_to_a_weight_is_not_fused(
    training: bool, use_dora: bool, is_fused: bool
) -> None:
    """Dropout, which there is in training alone, and DoRA's scale are nowhere in the matrix that a fused form takes."""
    graft = PersistentVisualMemory(16, 8, 8, head_dim=8, num_key_value_heads=1, eps=1e-6)
    adapter = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5, use_dora=use_dora, init_lora_weights=False)
    inject_adapter_in_model(adapter, graft)
    graft.train(training)
    graft.fused = Marked("cpu")
    keys = torch.randn(1, 1, 3, 8)
    output = graft.read_memory(torch.randn(1, 3, 16), keys, keys, torch.ones(1, 3, dtype=torch.bool), None, None)
    assert bool((output == 7).all()) is is_fused


def test_the_weight_that_a_fused_form_takes_is_the_one_the_projection_multiplies_by() -> None:
    graft = PersistentVisualMemory(16, 8, 8, head_dim=8, num_key_value_heads=1, eps=1e-6)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), graft)
    projection: Any = graft.q_proj
    hidden_states = torch.randn(3, 8)

    def output() -> Tensor:
        expected: Tensor = projection(hidden_states)
        torch.testing.assert_close(hidden_states @ weight_of(projection).T, expected)
        return expected

    adapted = output()
    projection.enable_adapters(False)
    assert not torch.allclose(output(), adapted)
    projection.enable_adapters(True)
    projection.merge()
    torch.testing.assert_close(output(), adapted)
