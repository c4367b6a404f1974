"""The mixin pass: what it adds, where, and what it refuses."""

import json
from pathlib import Path

import pytest

import passes
from checkpoints import tiny_checkpoint
from patching import apply
from surgeon.checkpoint.reader import Checkpoint
from surgeon.errors import SurgeonError
from surgeon.inputs import Inputs
from surgeon.patch import patch, plan
from surgeon.recipe import FILE_NAME, Recipe
from surgeon.side_files import image_processor_settings


def planned(source: Path, *arguments: str):  # type: ignore[no-untyped-def]
    recipe_passes = Recipe.from_arguments(arguments).make_passes(passes.registry())
    with Checkpoint.open(source, weights="optional") as checkpoint:
        return plan(checkpoint, recipe_passes)


def test_published_parameter_count_from_a_config_alone(tmp_path: Path) -> None:
    """CoMemo-2B: InternLM2-1.8B's sizes, a layer in front of every fourth."""
    text = {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": 92553,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    config = {"model_type": "internvl", "text_config": text, "torch_dtype": "bfloat16", "image_token_id": 92546}
    (tmp_path / "config.json").write_text(json.dumps(config))
    graph, report = planned(tmp_path, "mixin:every=4")
    assert report.new_parameters == 402_677_772
    assert set(report.grafts.values()) == {67_112_962}
    assert graph.record["grafts"][0]["layers"] == [3, 7, 11, 15, 19, 23]


def test_defaults_are_the_backbones(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "internvl")
    graph, _ = planned(source, "mixin")
    sizes = {"num_heads": 4, "head_dim": 16, "intermediate": 128, "rope_theta": 1e6, "eps": 1e-6}
    assert graph.record["grafts"] == [{"kind": "mixin", "layers": [3], **sizes, "visibility": "causal"}]
    assert "layout" not in graph.record


def test_defaults_are_those_of_any_backbone(tmp_path: Path) -> None:
    """None of them is the usual value of a published model."""
    rope = {"rope_type": "default", "rope_theta": 5e5}
    text = {"num_attention_heads": 2, "head_dim": 24, "intermediate_size": 72, "rms_norm_eps": 3e-6}
    source = tiny_checkpoint(tmp_path / "source", "internvl", text_type="llama", rope_parameters=rope, **text)
    (entry,) = planned(source, "mixin:layers=2")[0].record["grafts"]
    assert {"num_heads": 2, "head_dim": 24, "intermediate": 72, "rope_theta": 5e5, "eps": 3e-6}.items() <= entry.items()


@pytest.mark.parametrize(("limits", "expected"), [("3,max_tiles=3", (3, 3)), ("2,max_tiles=5", (2, 5)), ("4", (4, 6))])
def test_limits_of_tiles(limits: str, expected: tuple[int, int], tmp_path: Path) -> None:
    """As many at least as at most is every image cut alike."""
    source = tiny_checkpoint(tmp_path / "source", "internvl")
    apply(source, tmp_path / "out", f"rope-dhr:min_tiles={limits}")
    settings = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert (settings["min_patches"], settings["max_patches"]) == expected


def test_limits_of_tiles_go_where_transformers_reads_them(tmp_path: Path) -> None:
    """An image processor within the processor's file goes before the file of its own."""
    source = tiny_checkpoint(tmp_path / "source", "internvl")
    settings = json.loads((source / "preprocessor_config.json").read_text())
    (source / "processor_config.json").write_text(json.dumps({"image_processor": settings | {"max_patches": 20}}))
    apply(source, tmp_path / "out", "rope-dhr:max_tiles=3")
    assert Inputs.from_directory(tmp_path / "out").image_processor.max_patches == 3
    assert image_processor_settings(tmp_path / "out")["max_patches"] == 3


def test_own_sizes(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "internvl")
    graph, report = planned(source, "mixin:layers=0,2,num_heads=2,head_dim=8,intermediate=24,rope_theta=500")
    width, hidden = 2 * 8, 64
    assert report.grafts[f"{graph.family.text_model}.layers.0.mixin"] == (
        4 * width * hidden + 3 * 24 * hidden + 2 * hidden + 2
    )


@pytest.mark.parametrize("model_type", ["qwen3_vl", "qwen2_5_vl"])
def test_families_with_several_axes_turn_as_their_backbone(model_type: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", model_type)
    graph, _ = planned(source, "mixin:every=2", "pvm:layers=1,latent=32")
    assert graph.record["grafts"][0]["rope_axes"] == list(graph.family.rope_axes(graph.config))
    assert {type(child).kind for child in graph.decoder.layers[1].children() if hasattr(child, "kind")} == {
        "mixin",
        "pvm",
    }


def test_the_written_recipe_reproduces_it(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "internvl")
    apply(source, tmp_path / "first", "mixin:every=2,tiles=context", "rope-dhr:max_tiles=3")
    recipe = Recipe.read(tmp_path / "first" / FILE_NAME)
    patch(source, tmp_path / "second", recipe.make_passes(passes.registry()), seed=recipe.seed)
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("model_type", "arguments", "message"),
    [
        ("internvl", ["mixin:every=9"], "every:9, but the decoder has 4 layers"),
        ("internvl", ["mixin:every=2,layers=1"], "layers or every, not both"),
        ("internvl", ["mixin:layers=4"], "layer 4 is out of range"),
        ("internvl", ["mixin", "mixin"], "already applied, at layers"),
        ("internvl", ["mixin:head_dim=15"], "head_dim=15 is odd"),
        ("internvl", ["mixin:tiles=none"], "tiles"),
        ("qwen3_vl", ["mixin:head_dim=8"], "turns heads of 16 with several position axes"),
        ("qwen3_vl", ["mixin:tiles=memory"], "does not cut images into tiles"),
        ("qwen3_vl", ["rope-dhr"], "already have two dimensions"),
        ("internvl", ["rope-dhr", "rope-dhr"], "already applied"),
        ("internvl", ["rope-dhr:min_tiles=5,max_tiles=2"], "pass rope-dhr: min_tiles=5 is more than max_tiles=2"),
        # beside the processor's own other limit, which is 6
        ("internvl", ["rope-dhr:min_tiles=9"], "set min_patches=9 .* min_patches 9 is more than max_patches 6"),
        ("internvl", ["rope-dhr:max_tiles=5000"], "less than or equal to 1024"),
        ("ovis2", ["rope-dhr:min_tiles=4"], "chooses a grid by its most tiles alone; leave min_tiles out"),
        ("internvl", ["mixin:intermediate=99999999999999999999"], "'intermediate': .* less than or equal to 16777216"),
    ],
)
def test_what_is_refused(model_type: str, arguments: list[str], message: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", model_type)
    with pytest.raises(SurgeonError, match=message):
        planned(source, *arguments)


def test_an_epsilon_of_zero_is_refused_in_the_plan(tmp_path: Path) -> None:
    """A row of zeros would be NaN; a record would not take it."""
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl")
    with pytest.raises(SurgeonError, match="eps"):
        apply(source, tmp_path / "out", "mixin:layers=1,eps=0")
    assert not (tmp_path / "out").exists()
