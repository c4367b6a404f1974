"""What every graft has: values at insertion that follow from what a parameter is, and weights used through modules."""

from types import SimpleNamespace
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn

from surgeon.memory.graft import Graft
from surgeon.memory.inserted import Constant, Normal
from surgeon.memory.mixin import Mixin
from surgeon.memory.pvm import PersistentVisualMemory
from surgeon.memory.rms_norm import RMSNorm
from surgeon.memory.rotary import Rope


class Small(Graft):
    """A graft whose names say nothing of what they are."""

    kind = "small"
    site = "beside_mlp"
    gates = ("g",)

    def __init__(self) -> None:
        super().__init__()
        self.first = RMSNorm(4, 1e-6)
        self.norm = nn.Linear(4, 4, bias=False)
        self.g = nn.Parameter(torch.full((1,), 3.0))
        self.inner = nn.ModuleDict({"g": RMSNorm(4, 1e-6), "matrix": nn.Linear(4, 4, bias=False)})

    @classmethod
    def from_config(cls, text_config: Any, options: dict[str, Any]) -> Self:
        return cls()

    def project(self, visual_embeds: Tensor, rotary: Any = None) -> tuple[Tensor, Tensor]:
        keys = self.norm(visual_embeds)[:, None]
        return keys, keys

    def attend(self, hidden_states: Tensor, *rest: Any) -> Tensor:
        return self.g * self.norm(self.first(hidden_states))


def test_values_at_insertion_follow_from_what_a_parameter_is_not_from_its_name() -> None:
    assert Small().initialisers(0.5) == {
        "g": Constant(0.0),
        "first.weight": Constant(1.0),
        "norm.weight": Normal(0.5),
        "inner.g.weight": Constant(1.0),
        "inner.matrix.weight": Normal(0.5),
    }


@pytest.mark.parametrize(
    "graft",
    [
        PersistentVisualMemory(16, 8, 12, head_dim=4, num_key_value_heads=1, eps=1e-6),
        Mixin(16, num_heads=2, intermediate_size=12, rope=Rope(8, 1e4), eps=1e-6),
    ],
    ids=lambda graft: graft.kind,
)
def test_a_fresh_graft_can_learn(graft: Graft) -> None:
    """Gates zero, norms one, matrices neither: a zero matrix behind a zero gate would never move."""
    graft.reset_parameters(0.02)
    for name, parameter in graft.named_parameters():
        kind = "gate" if name in graft.gates else "norm" if parameter.ndim == 1 else "matrix"
        match kind:
            case "gate":
                assert not bool(parameter.any())
            case "norm":
                assert bool((parameter == 1).all())
            case "matrix":
                assert 0.01 < float(parameter.detach().std()) < 0.03, name
    assert graft.initialisers(0.02).keys() == dict(graft.named_parameters()).keys()


def test_every_projection_is_called() -> None:
    """Whoever hangs something on a module (an adapter, a hook that fetches its weights) is asked."""
    for graft, rotary in (
        (PersistentVisualMemory(16, 8, 12, head_dim=4, num_key_value_heads=1, eps=1e-6), None),
        (Mixin(16, num_heads=2, intermediate_size=12, rope=Rope(8, 1e4), eps=1e-6), True),
    ):
        called: set[str] = set()
        for name, module in graft.named_modules():
            if name:
                module.register_forward_hook(lambda *_, name=name, called=called: called.add(name))
        embeds, hidden_states = torch.randn(1, 3, 16), torch.randn(1, 2, 16)
        angles = [graft.rope(torch.arange(n)[None, None]) if rotary and graft.rope else None for n in (3, 2)]
        keys, values = graft.write_memory(embeds, angles[0])
        graft.read_memory(hidden_states, keys, values, torch.ones(1, 3, dtype=torch.bool), None, angles[1])
        assert called == {name for name, _ in graft.named_children()}


def test_a_branch_shares_keys_among_as_many_query_heads_as_the_backbone() -> None:
    """Also where its heads together are wider than its hidden states, as Qwen3-VL-4B's are."""
    text = SimpleNamespace(
        hidden_size=2560,
        intermediate_size=9728,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        rms_norm_eps=1e-6,
    )
    for latent, key_value_heads in ((512, 1), (1024, 2)):
        with torch.device("meta"):
            branch = PersistentVisualMemory.from_config(text, {"latent": latent})
        assert branch.q_proj.out_features // 128 == 4 * key_value_heads
        assert branch.k_proj.out_features == 128 * key_value_heads


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"site": "before"}, "site is 'before'"),
        ({"gates": ()}, "gates is empty"),
        ({"reference": lambda keys: keys}, "write staticmethod"),
    ],
)
def test_a_class_that_could_never_work_is_refused_where_it_is_written(attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        type("Wrong", (Small,), attributes)


def test_a_gate_that_is_no_parameter_is_named() -> None:
    wrong = type("Wrong", (Small,), {"gates": ("gate",)})
    with pytest.raises(ValueError, match="gates names gate; its own parameters are g$"):
        wrong().initialisers(0.5)


def test_norms_of_torch_are_one_and_biases_zero() -> None:
    class Other(Small):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.biased = nn.LayerNorm(4), nn.Linear(4, 4)

    values = Other().initialisers(0.5)
    assert values["second.weight"] == Constant(1.0) and values["biased.weight"] == Normal(0.5)
    assert values["second.bias"] == values["biased.bias"] == Constant(0.0)
