"""The PVM pass: what it adds, where, and what it refuses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import passes
from checkpoints import QWEN_TYPES, TEXT_TYPES, tiny_checkpoint
from patching import apply, batch, randomise_grafts
from surgeon import models
from surgeon.checkpoint.reader import Checkpoint
from surgeon.errors import SurgeonError
from surgeon.memory.inserted import Constant
from surgeon.patch import plan
from surgeon.pipeline import PreconditionError
from surgeon.recipe import FILE_NAME, Recipe

PUBLISHED = Path(__file__).parents[2] / "examples" / "recipes"
QWEN3_VL = {
    "2b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "8b": {"hidden_size": 4096, "intermediate_size": 12288},
    "4b": {"hidden_size": 2560, "intermediate_size": 9728},
}


def config_alone(directory: Path, size: str) -> Path:
    """Qwen3-VL's published sizes, without weights."""
    text = {
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
        **QWEN3_VL[size],
    }
    vision = {"out_hidden_size": QWEN3_VL[size]["hidden_size"]}
    config = {"model_type": "qwen3_vl", "text_config": text, "vision_config": vision, "torch_dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(params=QWEN_TYPES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "source", request.param)


@pytest.mark.parametrize(("size", "expected"), [("8b", 27_922_179), ("4b", 22_728_963)])
def test_published_parameter_counts_from_a_config_alone(size: str, expected: int, tmp_path: Path) -> None:
    recipe = Recipe.read(PUBLISHED / f"qwen3-vl-{size}-pvm.yaml")
    with Checkpoint.open(config_alone(tmp_path, size), weights="optional") as checkpoint:
        graph, report = plan(checkpoint, recipe.make_passes(passes.registry()))
    assert report.new_parameters == expected
    assert sum(report.grafts.values()) == sum(torch.Size(p.shape).numel() for p in graph.new_parameters().values())
    assert len(report.grafts) == 3
    assert list(tmp_path.iterdir()) == [tmp_path / "config.json"]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("0", [0]),
        ("3,1", [1, 3]),
        ("every:2", [1, 3]),
        ("every:4", [3]),
        ("strided:1", [2]),
        ("strided:4", [0, 1, 2, 3]),
    ],
)
def test_ways_to_name_layers(source: Path, layers: str, expected: list[int]) -> None:
    with Checkpoint.open(source) as checkpoint:
        graph, _ = plan(
            checkpoint, Recipe.from_arguments([f"pvm:layers={layers},latent=32"]).make_passes(passes.registry())
        )
    assert graph.record["grafts"] == [{"kind": "pvm", "layers": expected, "latent": 32, "visibility": "causal"}]
    grafted = [i for i, layer in enumerate(graph.decoder.layers) if hasattr(layer, "pvm")]
    assert grafted == expected


def test_strided_spreads_over_the_depth(tmp_path: Path) -> None:
    with Checkpoint.open(config_alone(tmp_path, "8b"), weights="optional") as checkpoint:
        graph, _ = plan(checkpoint, Recipe.from_arguments(["pvm:layers=strided:3"]).make_passes(passes.registry()))
    assert graph.record["grafts"][0]["layers"] == [9, 18, 27]


def test_only_the_branch_is_new_and_everything_else_is_the_source(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = apply(source, out, "pvm:layers=1,3,latent=32")
    with Checkpoint.open(source) as before, Checkpoint.open(out) as after:
        assert all(torch.equal(before.read(name), after.read(name)) for name in before.tensors)
        new = {name: info for name, info in after.tensors.items() if name not in before.tensors}
        assert all(".pvm." in name for name in new)
        assert sum(info.numel for info in new.values()) == report.new_parameters
        assert {str(info.file.name) for info in new.values()} == {"model-pvm.safetensors"}
        assert all(float(after.read(name)) == 0 for name in new if name.endswith("alpha"))
        zero = [name for name in new if not name.endswith("alpha") and not after.read(name).any()]
        assert not zero  # a zero matrix behind a zero gate would never learn


def test_gates_are_the_only_zeros_of_the_plan(source: Path) -> None:
    with Checkpoint.open(source) as checkpoint:
        graph, _ = plan(checkpoint, Recipe.from_arguments(["pvm:layers=1,latent=32"]).make_passes(passes.registry()))
    zeros = [name for name, p in graph.new_parameters().items() if p.initialiser == Constant(0.0)]
    assert zeros == ["model.language_model.layers.1.pvm.alpha"]


def test_the_written_recipe_reproduces_the_output(source: Path, tmp_path: Path) -> None:
    first, second, other = tmp_path / "first", tmp_path / "second", tmp_path / "other"
    apply(source, first, "pvm:layers=strided:2,latent=32", seed=7)
    recipe = Recipe.read(first / FILE_NAME)
    assert recipe.seed == 7 and recipe.passes[0]["pvm"] == {
        "layers": [1, 2],
        "latent": 32,
        "visibility": "causal",
    }
    from surgeon.patch import patch

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        patch(source, second, recipe.make_passes(passes.registry()), seed=recipe.seed)
    finally:
        torch.set_num_threads(threads)
    files = sorted(p.name for p in first.iterdir())
    assert files == sorted(p.name for p in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)
    apply(source, other, "pvm:layers=strided:2,latent=32", seed=8)
    assert (first / "model-pvm.safetensors").read_bytes() != (other / "model-pvm.safetensors").read_bytes()


def test_values_do_not_depend_on_other_layers(source: Path, tmp_path: Path) -> None:
    apply(source, tmp_path / "one", "pvm:layers=3,latent=32")
    apply(source, tmp_path / "two", "pvm:layers=1,3,latent=32")
    name = "model.language_model.layers.3.pvm.q_proj.weight"
    with (
        safe_open(tmp_path / "one" / "model-pvm.safetensors", "pt") as one,
        safe_open(tmp_path / "two" / "model-pvm.safetensors", "pt") as two,
    ):
        assert torch.equal(one.get_tensor(name), two.get_tensor(name))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pvm:layers=1,9,latent=32"], "layer 9 is out of range; the decoder has layers 0 to 3"),
        (["pvm:layers=-1,latent=32"], "layer -1 is out of range"),
        (["pvm:layers=1,1,latent=32"], "layer 1 is named twice"),
        (["pvm:layers=every:9,latent=32"], "the decoder has 4 layers"),
        (["pvm:layers=1,latent=40"], "latent=40 is not divisible by the backbone's head_dim 16; use 32 or 48"),
        (["pvm:layers=1,latent=8"], "use 16"),
        (["pvm:layers=1,latent=32", "pvm:layers=3,latent=32"], "already applied, at layers 1"),
        (["pvm:layers=a"], "expected a list of layers"),
        (["pvm:latent=32"], "option 'layers' is required"),
        (["pvm:layers=1,laten=32"], "unknown option 'laten'; did you mean 'latent'?"),
        (["pvn:layers=1"], "unknown pass 'pvn'; did you mean 'pvm'?"),
        (["pvm:1,layers=1"], "expected name:option=value"),
        (["pvm:layers=1,layers=2"], "given twice"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_way_out(
    source: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    with pytest.raises(SurgeonError) as caught:
        apply(source, tmp_path / "out", *arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("latent", "message"),
    [
        (640, "makes 5 query heads of 128, which 2 key/value heads cannot share evenly; use 512 or 768"),
        (896, "makes 7 query heads of 128, which 3 key/value heads cannot share evenly; use 768 or 1024"),
        (
            700,
            "not divisible by the backbone's head_dim 128; use 512 or 768",
        ),  # 640, the nearest multiple, does not work
        (100, "not divisible by the backbone's head_dim 128; use 128"),
    ],
)
def test_heads_that_do_not_divide_are_refused_in_the_plan(tmp_path: Path, latent: int, message: str) -> None:
    """Qwen3-VL-2B shares a key/value head among two query heads."""
    recipe_passes = Recipe.from_arguments([f"pvm:layers=8,latent={latent}"]).make_passes(passes.registry())
    opened = Checkpoint.open(config_alone(tmp_path, "2b"), weights="optional")
    with opened as checkpoint, pytest.raises(PreconditionError) as caught:
        plan(checkpoint, recipe_passes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("heads", "key_value_heads"), [(4, 2), (6, 2), (4, 1)])
def test_what_is_planned_runs(heads: int, key_value_heads: int, tmp_path: Path) -> None:
    """Every multiple of head_dim is either refused, naming two that are not, or computes."""
    sizes = {"num_attention_heads": heads, "num_key_value_heads": key_value_heads, "hidden_size": heads * 16}
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl", num_hidden_layers=2, **sizes)
    runs, named = set(), set()
    for latent in range(16, 16 * 11, 16):
        try:
            apply(source, tmp_path / str(latent), f"pvm:layers=1,latent={latent}")
        except PreconditionError as error:
            named |= {int(number) for number in re.findall(r"\d+", str(error).rpartition("use ")[2])}
            continue
        model = models.load(tmp_path / str(latent))
        image, grid = model.config.image_token_id, (1, 4, 4)
        kwargs = batch(model, [[5, *[image] * 4, 6]], [grid])
        kwargs["mm_token_type_ids"] = (kwargs["input_ids"] == image).long()
        randomise_grafts(model)
        with torch.no_grad():
            assert model(**kwargs).logits.isfinite().all()
        runs.add(latent)
    assert named and runs >= {latent for latent in named if latent < 16 * 11}


@pytest.mark.parametrize(
    ("model_type", "text"),
    [
        *((model_type, {}) for model_type in QWEN_TYPES),
        *((model_type, {"text_type": text}) for model_type in ("internvl", "ovis2") for text in TEXT_TYPES),
        ("llava_onevision", {"text_type": "qwen2"}),
        ("qwen3_vl", {"hidden_act": "swish"}),
    ],
)
def test_every_family_as_published_is_patched(model_type: str, text: dict[str, Any], tmp_path: Path) -> None:
    """Qwen2's and Qwen2.5-VL's attention has biases that no config asks for."""
    source = tiny_checkpoint(tmp_path / "source", model_type, **text)
    with Checkpoint.open(source) as checkpoint:
        _, report = plan(checkpoint, Recipe.from_arguments(["pvm:layers=1,latent=32"]).make_passes(passes.registry()))
    assert len(report.grafts) == 1


@pytest.mark.parametrize(
    ("model_type", "text", "message"),
    [
        ("qwen3_vl", {"attention_bias": True}, "attention_bias=True, and the branch's projections have no bias"),
        ("internvl", {"text_type": "llama", "attention_bias": True}, "attention_bias=True"),
        ("internvl", {"text_type": "llama", "mlp_bias": True}, "mlp_bias=True, and the branch's projections have no"),
        ("qwen2_5_vl", {"hidden_act": "gelu"}, "hidden_act='gelu', and the branch's MLP is SwiGLU"),
        ("ovis2", {"attention_dropout": 0.1}, "attention_dropout=0.1, and the branch's attention has no dropout"),
    ],
)
def test_a_backbone_of_another_form_is_refused_in_the_plan(
    model_type: str, text: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = tiny_checkpoint(tmp_path / "source", model_type, **text)
    with pytest.raises(PreconditionError) as caught:
        apply(source, tmp_path / "out", "pvm:layers=1,latent=32")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_patched_again_is_refused(source: Path, tmp_path: Path) -> None:
    apply(source, tmp_path / "out", "pvm:layers=1,latent=32")
    with pytest.raises(SurgeonError, match="already applied, at layers 1"):
        apply(tmp_path / "out", tmp_path / "again", "pvm:layers=2,latent=32")


@pytest.mark.parametrize("change", ["missing", "shape", "extra"])
def test_config_and_tensors_that_disagree(source: Path, tmp_path: Path, change: str) -> None:
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    if change == "missing":
        config["text_config"]["num_hidden_layers"] = 5
        config["text_config"].pop("layer_types", None)
    elif change == "extra":
        config["text_config"]["num_hidden_layers"] = 3
        config["text_config"].pop("layer_types", None)
    else:
        config["text_config"]["intermediate_size"] = 96
    (source / "config.json").write_text(json.dumps(config))
    messages = {
        "missing": "asks for tensors",
        "extra": "no place for tensor",
        "shape": "disagree: .*128, 64.*96, 64|disagree",
    }
    with pytest.raises(SurgeonError, match=messages[change]):
        apply(source, tmp_path / "out", "pvm:layers=1,latent=32")
    assert not (tmp_path / "out").exists()


def test_without_a_width_the_branch_has_the_published_one(tmp_path: Path) -> None:
    """512, section 5.1 of the paper."""
    recipe = Recipe.from_arguments(["pvm:layers=8"], 0)
    with Checkpoint.open(config_alone(tmp_path, "8b"), weights="optional") as checkpoint:
        graph, _ = plan(checkpoint, recipe.make_passes(passes.registry()))
    shapes = {name.rsplit("pvm.")[-1]: tuple(p.shape) for name, p in graph.new_parameters().items()}
    assert shapes["text_proj.weight"] == (512, 4096)
