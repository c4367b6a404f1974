"""PVM as its authors publish it -> a patched Qwen3-VL with the same numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import command
import surgeon.importers._tensors
from checkpoints import TOKENIZER_FILES, copy_tokenizer, has_tokenizer, tiny_config, write_processors
from golden import DATA, expected_tensors, our_name
from surgeon import models
from surgeon.checkpoint import Checkpoint
from surgeon.errors import CheckpointError, OptionError, SurgeonError
from surgeon.importing import import_checkpoint

Change = Callable[[dict[str, Any]], Any]
LAYER = "model.language_model.layers.{}.pvm_block."
CODE = {"AutoConfig": "configuration_qwen3_vl.PVMQwen3VLConfig"}


def published(
    directory: Path, change: Change = lambda config: None, change_tensors: Change = lambda tensors: None
) -> Path:
    """The golden model with the config that the authors' classes save: layers and width in text_config."""
    directory.mkdir(parents=True)
    config = json.loads((DATA / "pvm_model_a" / "config.json").read_text())
    pvm = config.pop("pvm")
    config["architectures"], config["auto_map"] = ["PVMQwen3VLForConditionalGeneration"], CODE
    config["text_config"] |= {"pvm_layers": pvm["layers"], "pvm_hidden_size": pvm["latent"]}
    tensors = load_file(DATA / "pvm_model_a" / "model.safetensors")
    change(config)
    change_tensors(tensors)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def inputs(model: Any) -> dict[str, torch.Tensor]:
    """The golden prompt, its image as the vision tower takes it."""
    expected = expected_tensors()
    kwargs = {k: expected[k] for k in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")}
    return {**kwargs, "mm_token_type_ids": (expected["input_ids"] == model.config.image_token_id).long()}


def assert_the_authors_numbers(model: Any) -> None:
    expected = expected_tensors()
    with torch.no_grad():
        logits = model(**inputs(model)).logits
        tokens = model.generate(**inputs(model), max_new_tokens=12, min_new_tokens=12, do_sample=False)
    torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)
    assert tokens[:, -12:].tolist() == expected["greedy"].tolist()


def test_cards_of_the_source_stand_beside_the_new_one(tmp_path: Path) -> None:
    source = published(tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: mit\n---\ntheirs")
    (source / "README-source.md").write_text("its own source's")
    import_checkpoint(source, tmp_path / "out")
    cards = {path.name: path.read_text() for path in (tmp_path / "out").glob("README*")}
    assert cards["README-source.md"].endswith("theirs") and cards["README-source-2.md"] == "its own source's"
    assert len(cards) == 3 and "license: mit" in cards["README.md"] and "theirs" not in cards["README.md"]


# -- numbers -----------------------------------------------------------------------------------------------------
def test_the_golden_model_gives_the_authors_numbers(tmp_path: Path) -> None:
    """As it lies there: its tensors alone say that it has PVM, and where."""
    done = command.run("import", DATA / "pvm_model_a", tmp_path / "out")
    assert done.exit_code == 0 and "grafted pvm at layers 1, 3" in done.stdout
    assert_the_authors_numbers(models.load(tmp_path / "out"))


def test_a_published_checkpoint_gives_the_authors_numbers(tmp_path: Path) -> None:
    report = import_checkpoint(published(tmp_path / "source"), tmp_path / "out")
    assert (report.source_type, report.model_type) == ("pvm_qwen3_vl", "surgeon_qwen3_vl")
    assert (report.grafts, report.image_token_id) == ({"pvm": [1, 3]}, 500)
    assert report.bytes_written == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    model = models.load(tmp_path / "out")
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert_the_authors_numbers(model)


def test_loads_without_this_tool(tmp_path: Path) -> None:
    import_checkpoint(published(tmp_path / "source"), tmp_path / "out")
    model, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values()), info
    assert_the_authors_numbers(model.eval())


def test_every_tensor_comes_through_bit_for_bit(tmp_path: Path) -> None:
    def bfloat16(tensors: dict[str, Any]) -> None:
        tensors |= {name: tensor.bfloat16() for name, tensor in tensors.items()}

    source = published(tmp_path / "source", change_tensors=bfloat16)
    import_checkpoint(source, tmp_path / "out")
    theirs, ours = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    names = {}
    for name in theirs:
        head, block, tail = name.partition("pvm_block.")
        names[name] = f"{head}pvm.{our_name(tail)}" if block else name
    assert set(names.values()) == set(ours)
    for name, tensor in theirs.items():
        assert ours[names[name]].dtype == torch.bfloat16 and torch.equal(ours[names[name]], tensor), name


def test_shards_stay_shards_and_one_tensor_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = published(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, source / file, {"format": "pt"})
    weight_map = {name: file for file, part in parts.items() for name in part}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    released: list[str] = []
    release = surgeon.importers._tensors.Checkpoint.release

    def counted(checkpoint: Any, name: str) -> None:
        released.append(name)
        release(checkpoint, name)

    monkeypatch.setattr(surgeon.importers._tensors.Checkpoint, "release", counted)
    import_checkpoint(source, tmp_path / "out")
    assert len(set(released)) >= len(tensors) - 1
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == sorted(parts)
    assert_the_authors_numbers(models.load(tmp_path / "out"))


# -- what is beside the weights ----------------------------------------------------------------------------------
def test_the_record_and_the_config(tmp_path: Path) -> None:
    import_checkpoint(published(tmp_path / "source"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    record = config["surgeon"]
    assert record["grafts"] == [{"kind": "pvm", "layers": [1, 3], "latent": 32, "visibility": "all"}]
    assert record["passes"] == [] and record["source"]["model_type"] == "qwen3_vl"
    assert config["model_type"] == "surgeon_qwen3_vl"
    assert not {"pvm_layers", "pvm_hidden_size"} & {*config, *config["text_config"]}
    assert "configuration_qwen3_vl" not in json.dumps(config)


@pytest.mark.skipif(not has_tokenizer(), reason="the demo checkpoint is not there")
def test_what_transformers_reads_comes_along_and_no_code(tmp_path: Path) -> None:
    source = published(tmp_path / "source")
    copy_tokenizer(source)
    write_processors(source, "qwen3_vl", tiny_config("qwen3_vl"))
    (source / "modeling_qwen3_vl.py").write_text("raise SystemExit('run')")
    (source / "LICENSE").write_text("MIT")
    assert import_checkpoint(source, tmp_path / "out").warnings == []
    for name in (*TOKENIZER_FILES, "LICENSE"):
        if (source / name).is_file():
            assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    described, expected = (json.loads((d / "preprocessor_config.json").read_text()) for d in (tmp_path / "out", source))
    assert described == {**expected, "processor_class": "Qwen3VLProcessor"}  # the model_type no longer says it
    assert not (tmp_path / "out" / "modeling_qwen3_vl.py").exists()


def test_without_tokenizer_and_image_processor_is_a_warning(tmp_path: Path) -> None:
    done = command.run("import", published(tmp_path / "source"), tmp_path / "out")
    tokenizer, processor = done.stderr.splitlines()
    assert tokenizer.startswith("warning: ") and "has no tokenizer" in tokenizer
    assert processor.startswith("warning: ") and "has no image processor" in processor


# -- what cannot be ----------------------------------------------------------------------------------------------
def pop_layer(tensors: dict[str, Any]) -> None:
    for name in [name for name in tensors if name.startswith(LAYER.format(3))]:
        del tensors[name]


def narrower(tensors: dict[str, Any]) -> None:
    name = LAYER.format(3) + "text_reducer.weight"
    tensors[name] = tensors[name][:16].clone()


@pytest.mark.parametrize(
    ("change", "change_tensors", "parts"),
    [
        (lambda c: c["text_config"].update(pvm_layers=[1]), None, ("pvm_layers is [1]", "[1, 3]")),
        (lambda c: c["text_config"].update(pvm_layers="1,3"), None, ("pvm_layers is '1,3'", "[1, 3]")),
        (lambda c: c["text_config"].update(pvm_hidden_size=64), None, ("pvm_hidden_size is 64", "32")),
        (lambda c: c["text_config"].update(hidden_act="gelu"), None, ("hidden_act is 'gelu'", "silu")),
        (lambda c: c.pop("text_config"), None, ("text_config is missing",)),
        (lambda c: c.pop("image_token_id"), None, ("image_token_id is missing",)),
        (None, pop_layer, ("pvm_layers is [1, 3]", "layers [1]")),
        (None, narrower, ("different widths", "{1: 32, 3: 16}")),
        (None, lambda t: t.pop(LAYER.format(1) + "text_reducer.weight"), ("no matrix", "layers.1.pvm_block.text_red")),
        (None, lambda t: t.pop(LAYER.format(1) + "gate_alpha"), ("no tensor for", "layers.1.pvm.alpha")),
        (None, lambda t: t.pop("model.visual.merger.norm.bias"), ("no tensor for", "model.visual.merger.norm.bias")),
        (None, lambda t: t.update({LAYER.format(1) + "gate_beta": torch.ones(1)}), ("pvm_block.gate_beta", "no place")),
        (
            None,
            lambda t: t.update({LAYER.format(1) + "cross_attn.q_proj.bias": torch.ones(32)}),
            ("cross_attn.q_proj.bias", "no place"),
        ),
        (None, lambda t: t.update({"lm_head.bias": torch.ones(600)}), ("lm_head.bias", "no place")),
        (None, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].int()}), ("lm_head.weight", "int32")),
    ],
)
def test_what_cannot_be_converted(
    tmp_path: Path, change: Change | None, change_tensors: Change | None, parts: tuple[str, ...]
) -> None:
    source = published(tmp_path / "in" / "source", change or (lambda c: None), change_tensors or (lambda t: None))
    with pytest.raises(CheckpointError) as caught:
        import_checkpoint(source, tmp_path / "out")
    assert all(part in str(caught.value) for part in parts), caught.value
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_another_image_token_than_the_config_s(tmp_path: Path) -> None:
    source = published(tmp_path / "source")
    with pytest.raises(OptionError, match="499 was asked for, and config.json says 500"):
        import_checkpoint(source, tmp_path / "out", image_token_id=499)


def test_a_plain_qwen3_vl_needs_no_import(tmp_path: Path) -> None:
    def plain(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if ".pvm_block." in name]:
            del tensors[name]

    def no_layers(config: dict[str, Any]) -> None:
        config["text_config"] |= {"pvm_layers": None}

    source = published(tmp_path / "source", no_layers, plain)
    with pytest.raises(SurgeonError, match="no importer for model_type 'qwen3_vl'"):
        import_checkpoint(source, tmp_path / "out")
    with Checkpoint.open(source) as opened:
        models.read_model(opened)
