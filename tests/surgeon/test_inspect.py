"""`surgeon inspect`: sizes and parameters per part, for plain, patched and config-only checkpoints."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import passes
from checkpoints import QWEN_TYPES, tiny_checkpoint, tiny_config
from patching import apply
from surgeon import models
from surgeon.errors import CheckpointError
from surgeon.inspect import Inspection, describe_passes, inspect_checkpoint


def parts_of(inspection: Inspection) -> dict[str, int]:
    return {part.name: part.parameters for part in inspection.parts}


@pytest.mark.parametrize("model_type", QWEN_TYPES)
@pytest.mark.parametrize("tied", [False, True])
def test_parts_add_up_to_the_model(tmp_path: Path, model_type: str, tied: bool) -> None:
    path = tiny_checkpoint(tmp_path / "model", model_type, torch.bfloat16, sharded=True, tie_word_embeddings=tied)
    inspection = inspect_checkpoint(path)
    model = models.load(path)
    count = sum(p.numel() for p in model.parameters())
    parts = parts_of(inspection)
    assert (inspection.family, inspection.dtype) == (model_type, "bfloat16")
    assert (inspection.tied_embeddings, inspection.grafts) == (tied, [])
    assert inspection.parameters == sum(parts.values()) == count
    assert inspection.bytes == 2 * count
    vocabulary = inspection.text.vocab_size * 64
    assert parts["embeddings"] == vocabulary
    assert parts["lm_head"] == (0 if tied else vocabulary)
    assert parts["projector"] == sum(p.numel() for p in model.model.visual.merger.parameters())
    assert parts["vision tower"] + parts["projector"] == sum(p.numel() for p in model.model.visual.parameters())
    assert len(inspection.files) > 1
    assert {f.name: f.bytes for f in inspection.files} == {
        file.name: file.stat().st_size for file in path.glob("*.safetensors")
    }
    assert sum(f.tensors for f in inspection.files) == len(model.state_dict()) - tied


def test_a_patched_checkpoint_names_each_graft(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl")
    report = apply(source, tmp_path / "patched", "pvm:layers=1,3,latent=32")
    inspection = inspect_checkpoint(tmp_path / "patched")
    assert {name: n for name, n in parts_of(inspection).items() if name.endswith(".pvm")} == report.grafts
    assert [(g.kind, g.layers, g.options, g.parameters) for g in inspection.grafts] == [
        ("pvm", [1, 3], {"latent": 32, "visibility": "causal"}, report.new_parameters)
    ]
    assert inspection.passes == [{"pvm": {"layers": [1, 3], "latent": 32, "visibility": "causal"}}]
    assert inspection.source is not None and inspection.source["name"] == "source"
    assert parts_of(inspection)["decoder"] == parts_of(inspect_checkpoint(source))["decoder"]
    assert Inspection.model_validate_json(inspection.model_dump_json()) == inspection


def test_a_config_alone_is_enough(tmp_path: Path) -> None:
    whole = tiny_checkpoint(tmp_path / "whole", "qwen3_vl")
    (tmp_path / "config").mkdir()
    shutil.copyfile(whole / "config.json", tmp_path / "config" / "config.json")
    alone, with_weights = inspect_checkpoint(tmp_path / "config"), inspect_checkpoint(whole)
    assert alone.files == [] and alone.parts == with_weights.parts
    assert alone.graft_sites.model_dump() == {"first_layer": 0, "last_layer": 3, "latent_multiple": 16}
    assert alone.deepstack_layers == 2


def test_a_vision_patch_size_and_depth_are_the_configs(tmp_path: Path) -> None:
    config = tiny_config("qwen2_5_vl")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    inspection = inspect_checkpoint(tmp_path)
    assert inspection.vision.model_dump() == {"layers": 3, "hidden_size": 32, "attention_heads": 2, "patch_size": 14}
    assert inspection.deepstack_layers == 0


def test_config_and_tensors_that_disagree_are_refused(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "model", "qwen3_vl")
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["intermediate_size"] *= 2
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="disagree"):
        inspect_checkpoint(path)


def test_passes_are_described_with_their_options() -> None:
    described = {each.name: each for each in describe_passes(passes.registry())}["pvm"]
    options = {option.name: option for option in described.options}
    assert described.identity and list(options) == ["layers", "visibility", "latent"]
    assert options["layers"].required and options["layers"].default is None
    assert (options["latent"].type, options["latent"].default) == ("int", 512)
    assert "head_dim" in options["latent"].description
