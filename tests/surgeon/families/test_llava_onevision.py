"""LLaVA-OneVision against transformers: visual tokens of images of any size, the exported vision tower, patching."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import LlavaOnevisionProcessor
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from checkpoints import TEXT_TYPES, TOKEN_IDS, tiny_config, tiny_model
from patching import apply
from surgeon import models
from surgeon.errors import FamilyError, InputError
from surgeon.families import family

IMAGE, VIDEO = TOKEN_IDS["image_token_id"], TOKEN_IDS["video_token_id"]
FAMILY = family("llava_onevision")
# wide, high, square, one tile, one of several; more than four tiles' worth of features is scaled down
GRIDS = [(4, 40, 130), (4, 200, 40), (10, 410, 400), (2, 40, 40), (3, 53, 37), (1, 90, 60)]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llava_onevision")


def image(grid, seed=0):
    return np.random.default_rng(seed).standard_normal((grid[0], 3, 42, 42), dtype=np.float32)


def features_of(model, grid, pixels):
    alone = 1 if grid[0] > 1 else 2
    with torch.no_grad():
        outputs = model.model.get_image_features(
            torch.from_numpy(pixels)[None].repeat(alone, 1, 1, 1, 1),
            torch.tensor([grid[1:]] * alone),
            batch_num_images=torch.tensor([alone]),
        )
    return outputs.pooler_output[0]


def run_export(export, inputs):
    with torch.no_grad():
        return export.module(**{name: torch.from_numpy(value) for name, value in inputs.items()})[0]


def test_what_the_family_says_of_a_config(model):
    config = model.config
    assert FAMILY.visual_token_ids(config) == (IMAGE, VIDEO) and FAMILY.tile_layout(config) is None
    assert FAMILY.head_dim(config) == model.model.language_model.layers[0].self_attn.head_dim
    for path in (FAMILY.vision_tower, FAMILY.projector, FAMILY.text_model, FAMILY.lm_head):
        assert sum(p.numel() for p in model.get_submodule(path).parameters()) > 0


@settings(max_examples=200)
@given(height=st.integers(1, 3000), width=st.integers(1, 3000))
def test_tokens_of_a_lone_image_are_as_many_as_the_processor_writes(height, width):
    config = tiny_config("llava_onevision")

    class Processor(LlavaOnevisionProcessor):
        """Its arithmetic, without a tokenizer and a video processor."""

        num_image_tokens, vision_aspect_ratio = 36, config.vision_aspect_ratio
        image_processor = config  # for its image_grid_pinpoints

        def __init__(self):
            pass

    expected = Processor()._get_number_of_features(height, width, 42, 42)
    assert FAMILY.image_tokens(config, (99, height, width)) == expected


@settings(max_examples=60)
@given(height=st.integers(8, 600), width=st.integers(8, 600))
def test_visual_tokens_are_packed_as_in_transformers(height, width):
    """Every feature a number of its own: a mixture tells where it comes from."""
    config = tiny_config("llava_onevision")
    rows, columns = FAMILY.tiles(config, (2, height, width))
    grid = (1 + rows * columns, height, width)
    inputs = FAMILY.vision_inputs(config, image(grid), grid)
    features = torch.rand(grid[0], 36, 2, generator=torch.Generator().manual_seed(0))
    line_break = torch.tensor([5.0, 7.0])
    packed, _ = LlavaOnevisionModel.pack_image_features(
        type("Model", (), {"config": config}),
        [features],
        torch.tensor([[height, width]]),
        line_break,
        config.vision_aspect_ratio,
    )
    table = torch.cat((features.flatten(0, 1), line_break[None]))
    ours = (table[inputs["feature_index"]] * torch.from_numpy(inputs["feature_weight"])[..., None]).sum(1)
    torch.testing.assert_close(ours, packed[0], rtol=0, atol=2e-5)
    assert len(ours) == FAMILY.image_tokens(config, grid)


@pytest.mark.parametrize("grid", GRIDS)
def test_export_module_computes_the_vision_tower(model, grid):
    pixels = image(grid)
    inputs = FAMILY.vision_inputs(model.config, pixels, grid)
    assert inputs["feature_index"].dtype == np.int64 and inputs["feature_weight"].dtype == np.float32
    features = run_export(FAMILY.vision_export(model, torch.float32), inputs)
    expected = features_of(model, grid, pixels)
    assert expected.std() > 0.3
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", [-2, 1])
def test_features_of_an_earlier_layer(layer):
    model = tiny_model("llava_onevision", top={"vision_feature_layer": layer})
    pixels = image(GRIDS[0])
    export = FAMILY.vision_export(model, torch.float32)
    assert not any("post_layernorm" in name or "layers.2." in name for name in export.parameters.values())
    features = run_export(export, FAMILY.vision_inputs(model.config, pixels, GRIDS[0]))
    torch.testing.assert_close(features, features_of(model, GRIDS[0], pixels), rtol=1e-5, atol=1e-5)


def test_torch_export_from_meta_takes_any_image(model):
    with torch.device("meta"):
        empty = type(model)._from_config(model.config, dtype=torch.float32)
    export = FAMILY.vision_export(empty, torch.float32)
    assert all(tensor.is_meta for tensor in export.example.values())
    program = torch.export.export(export.module, (), export.example, dynamic_shapes=export.dynamic_shapes, strict=False)
    assert set(program.state_dict) == set(export.parameters)
    real = FAMILY.vision_export(model, torch.float32)
    program = torch.export.export(real.module, (), real.example, dynamic_shapes=real.dynamic_shapes, strict=False)
    for grid in GRIDS:
        inputs = FAMILY.vision_inputs(model.config, image(grid), grid)
        with torch.no_grad():
            (features,) = program.module()(**{name: torch.from_numpy(value) for name, value in inputs.items()})
        torch.testing.assert_close(features, run_export(real, inputs), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("top", "message"),
    [
        ({"vision_aspect_ratio": "pad"}, "'pad' with vision_feature_select_strategy 'full' is not supported"),
        ({"vision_feature_select_strategy": "default"}, "strategy 'default' is not supported"),
    ],
)
def test_configs_that_are_not_supported(top, message):
    with pytest.raises(FamilyError, match=message):
        FAMILY.image_tokens(tiny_config("llava_onevision", top=top), (4, 40, 130))


def test_features_of_several_layers_cannot_be_exported():
    model = tiny_model("llava_onevision", top={"vision_feature_layer": [-1, -2]})
    with pytest.raises(FamilyError, match=r"vision_feature_layer \[-1, -2\] cannot be exported"):
        FAMILY.vision_export(model, torch.float32)


@pytest.mark.parametrize(
    ("shape", "grid", "message"),
    [
        ((3, 3, 42, 42), (3, 40, 130), r"40 x 130 pixels was given as 3 crop.s., expected 4, or 1 among others"),
        ((3, 3, 42, 42), (4, 40, 130), "was given as 3 crop"),
        ((4, 3, 28, 42), (4, 40, 130), "crops are 28 x 42 pixels, the vision tower takes 42 x 42"),
    ],
)
def test_images_that_are_no_image(model, shape, grid, message):
    with pytest.raises(InputError, match=message):
        FAMILY.vision_inputs(model.config, np.zeros(shape, dtype=np.float32), grid)


@pytest.mark.parametrize("layout", ["published", "native"])
@pytest.mark.parametrize("text_type", TEXT_TYPES)
def test_a_new_graft_changes_nothing_and_both_key_layouts_load(text_type, layout, tmp_path):
    source = tiny_model("llava_onevision", text_type=text_type)
    source.save_pretrained(tmp_path / "source", save_original_format=layout == "published")
    with safe_open(tmp_path / "source" / "model.safetensors", "pt") as file:
        published = "image_newline" in file.keys()  # noqa: SIM118 (it is no dict)
    assert published == (layout == "published")
    apply(tmp_path / "source", tmp_path / "patched", "pvm:layers=1,3,latent=32")
    patched = models.load(tmp_path / "patched")
    grids = [[(4, 40, 130)], [(1, 90, 60), (1, 50, 50)]]
    ids = [[5, *[IMAGE] * sum(FAMILY.image_tokens(source.config, grid) for grid in row), 6, 7] for row in grids]
    length = max(map(len, ids))
    kwargs = FAMILY.model_kwargs([[image(grid) for grid in row] for row in grids], grids)
    kwargs |= {
        "input_ids": np.array([[0] * (length - len(row)) + row for row in ids]),
        "attention_mask": np.array([[0] * (length - len(row)) + [1] * len(row) for row in ids]),
    }
    tensors = {name: torch.from_numpy(array) for name, array in kwargs.items()}
    with torch.no_grad():
        before = source(**tensors).logits
        assert torch.equal(patched(**tensors).logits, before) and before.std() > 1
        tokens = [m.generate(**tensors, max_new_tokens=6, do_sample=False, pad_token_id=0) for m in (source, patched)]
        assert torch.equal(*tokens)
        patched.model.language_model.layers[1].pvm.alpha.fill_(0.8)
        assert (patched(**tensors).logits - before)[:, -1].abs().max() > 0.1


def test_the_most_tiles_are_those_of_the_largest_resolution():
    """Which need not be as high and as wide as any other is."""
    size = {"height": 336, "width": 336}
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    assert FAMILY.most_tiles({"size": size, "image_grid_pinpoints": pinpoints}) == 5
    assert FAMILY.most_tiles({"size": size}) is None and FAMILY.most_tiles({"image_grid_pinpoints": pinpoints}) is None
