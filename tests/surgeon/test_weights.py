"""Where a checkpoint holds a model's weights: every place one tensor, every tensor one place."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import FineGrainedFP8Config

from checkpoints import tiny_model
from surgeon.checkpoint import Checkpoint
from surgeon.errors import CheckpointError
from surgeon.models import load, read_model
from surgeon.weights import Stored, Tied

LM_HEAD, EMBED = "lm_head.weight", "model.language_model.embed_tokens.weight"
Tensors = dict[str, torch.Tensor]


def checkpoint(
    directory: Path, model_type: str, change: Callable[[Tensors], Any] = lambda t: None, **options: Any
) -> Path:
    tiny_model(model_type, **options).save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    (directory / "model.safetensors").unlink()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize("stored", [EMBED, LM_HEAD])
def test_one_of_two_tied_tensors_is_enough(tmp_path: Path, stored: str) -> None:
    def change(tensors: Tensors) -> None:
        tensors[stored] = tensors.pop(EMBED)

    directory = checkpoint(tmp_path / "tied", "qwen3_vl", change, tie_word_embeddings=True)
    with Checkpoint.open(directory) as opened:
        plan = read_model(opened).weights
    (other,) = {EMBED, LM_HEAD} - {stored}
    assert plan[other] == Tied(stored) and isinstance(plan[stored], Stored)
    model = load(directory)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_without_either_of_two_tied_tensors(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path / "tied", "qwen3_vl", lambda t: t.pop(EMBED), tie_word_embeddings=True)
    with Checkpoint.open(directory) as opened, pytest.raises(CheckpointError, match=f"does not hold: {LM_HEAD}"):
        read_model(opened)


def test_buffers_that_transformers_computes_itself_are_passed_over(tmp_path: Path) -> None:
    """Old checkpoints hold each layer's rotary frequencies."""

    def change(tensors: Tensors) -> None:
        tensors["model.language_model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    directory = checkpoint(tmp_path / "old", "qwen3_vl", change)
    with Checkpoint.open(directory) as opened:
        assert not any("inv_freq" in name for name in read_model(opened).weights)
    load(directory)


def test_older_keys_have_their_place(tmp_path: Path) -> None:
    """transformers still saves Qwen2.5-VL under the names that it was first published with."""
    directory = checkpoint(tmp_path / "old", "qwen2_5_vl")
    with Checkpoint.open(directory) as opened:
        stored = read_model(opened).weights["model.visual.merger.mlp.0.weight"]
    assert isinstance(stored, Stored) and stored.key == "visual.merger.mlp.0.weight"
    load(directory)


def test_two_tensors_of_one_place(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["model.visual.merger.mlp.0.weight"] = torch.zeros_like(tensors["visual.merger.mlp.0.weight"])

    directory = checkpoint(tmp_path / "both", "qwen2_5_vl", change)
    with pytest.raises(CheckpointError, match=r"are both model\.visual\.merger\.mlp\.0\.weight"):
        load(directory)


def test_a_key_mapping_of_the_caller_s(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["head.weight"] = tensors.pop(LM_HEAD)

    directory = checkpoint(tmp_path / "renamed", "qwen3_vl", change)
    with pytest.raises(CheckpointError, match=r"no place for tensor head\.weight"):
        load(directory)
    model = load(directory, key_mapping={r"^head\.": "lm_head."})
    assert torch.equal(model.lm_head.weight, load_file(directory / "model.safetensors")["head.weight"])


# -- what transformers says of the loading -------------------------------------------------------------------------
def test_other_files_than_those_that_were_checked(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path / "variants", "qwen3_vl")
    tensors = load_file(directory / "model.safetensors")
    name = "model.language_model.layers.2.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, directory / "model.short.safetensors", {"format": "pt"})
    save_file({**tensors, "extra": torch.ones(1)}, directory / "model.long.safetensors", {"format": "pt"})
    load(directory)
    with pytest.raises(CheckpointError, match=f"found no values for {name}"):
        load(directory, variant="short")
    with pytest.raises(CheckpointError, match="found no place for extra"):
        load(directory, variant="long")


def test_mismatched_sizes_are_refused_though_they_may_be_ignored(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path / "sizes", "qwen3_vl", lambda t: t.update({LM_HEAD: t[LM_HEAD][:100].clone()}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is \[100, 64\]"):
        load(directory, ignore_mismatched_sizes=True)


def test_keywords_of_transformers_reach_it(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path / "plain", "qwen3_vl")
    model = load(directory, dtype=torch.bfloat16, attn_implementation="eager")
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"


def fp8(directory: Path, **settings: Any) -> Path:
    """A checkpoint whose decoder is stored as Qwen's own FP8 ones are, blocks of 16 x 16, every scale 1."""

    def change(tensors: Tensors) -> None:
        for name in [n for n, t in tensors.items() if ".language_model.layers." in n and t.ndim == 2]:
            rows, columns = tensors[name].shape
            tensors[name + "_scale_inv"] = torch.ones(rows // 16, columns // 16)
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    checkpoint(directory, "qwen3_vl", change, dtype=torch.bfloat16)
    config = json.loads((directory / "config.json").read_text())
    skipped = ["lm_head", "model.visual"]
    settings = {"weight_block_size": [16, 16], "modules_to_not_convert": skipped, **settings}
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic", **settings}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_quantised_checkpoints_are_loaded_and_not_rewritten(tmp_path: Path) -> None:
    directory = fp8(tmp_path / "fp8", dequantize=True)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    stored = load_file(directory / "model.safetensors")
    assert torch.equal(load(directory).get_parameter(name), stored[name].bfloat16())
    with Checkpoint.open(directory) as opened, pytest.raises(CheckpointError, match=r"quantised \(fp8\)"):
        read_model(opened)
    del stored[name], stored[name + "_scale_inv"]
    (directory / "model.safetensors").unlink()
    save_file(stored, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"found no values for {name}"):
        load(directory)


def test_a_quantiser_that_the_caller_names(tmp_path: Path) -> None:
    directory = fp8(tmp_path / "fp8")
    model = load(directory, quantization_config=FineGrainedFP8Config(dequantize=True))
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert torch.equal(model.get_parameter(name), load_file(directory / "model.safetensors")[name].bfloat16())
