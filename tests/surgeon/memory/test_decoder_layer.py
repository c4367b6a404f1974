"""What a family declares of its decoder layers is checked against their parts wherever a model is made."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.qwen3_vl import modeling_qwen3_vl

from checkpoints import QWEN_TYPES, tiny_checkpoint, tiny_config
from command import assert_refused, run
from surgeon.errors import FamilyError
from surgeon.families import family
from surgeon.memory.decoder_layer import NORM_PLACEMENTS, PreNormLayer, check_parts
from surgeon.models import build_meta


class Sandwich(nn.Module):
    """Gemma 3's: norms before and behind, of which a pre-norm forward would leave two out."""

    def __init__(self, *more: str, without: str = "") -> None:
        super().__init__()
        for name in {*PreNormLayer.parts, *more} - {without}:
            self.add_module(name, nn.Identity())


@pytest.mark.parametrize("model_type", QWEN_TYPES)
def test_every_family_declares_it_itself(model_type: str) -> None:
    assert "norm_placement" in vars(type(family(model_type)))
    assert family(model_type).norm_placement in NORM_PLACEMENTS


def test_other_parts_are_named() -> None:
    check_parts(Sandwich(), "pre_norm")
    with pytest.raises(ValueError, match="a Sandwich is no pre_norm layer: it has also pre_feedforward_layernorm"):
        check_parts(Sandwich("pre_feedforward_layernorm"), "pre_norm")
    with pytest.raises(ValueError, match="it lacks input_layernorm"):
        check_parts(Sandwich(without="input_layernorm"), "pre_norm")
    grafted = Sandwich("pvm")
    grafted.graft_sites = {"pvm": "beside_mlp"}
    check_parts(grafted, "pre_norm")


@pytest.mark.parametrize("command", ["inspect", "patch", "export", "generate"])
def test_a_family_that_declares_it_wrongly_is_refused(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl", torch.float32, num_hidden_layers=1)
    more = {
        "inspect": (),
        "patch": (tmp_path / "out", "--pass", "pvm:layers=0,latent=32"),
        "export": (tmp_path / "out", "--dtype", "fp32", "--max-length", 8),
        "generate": ("--prompt", "Hi"),
    }
    monkeypatch.setattr(PreNormLayer, "parts", PreNormLayer.parts | {"pre_feedforward_layernorm"})
    expected = ("family qwen3_vl declares norm_placement wrongly", "lacks pre_feedforward_layernorm")
    assert_refused(run(command, source, *more[command]), *expected)


def test_every_layer_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    layer_class: Any = modeling_qwen3_vl.Qwen3VLTextDecoderLayer
    plain = layer_class.__init__

    def init(self: Any, config: Any, layer_idx: int) -> None:
        plain(self, config, layer_idx)
        if layer_idx == 1:
            self.pre_feedforward_layernorm = nn.Identity()

    monkeypatch.setattr(layer_class, "__init__", init)
    with pytest.raises(FamilyError, match="declares norm_placement wrongly.*has also pre_feedforward_layernorm"):
        build_meta(tiny_config("qwen3_vl"))
