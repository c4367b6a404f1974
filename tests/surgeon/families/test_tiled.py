"""The families that cut an image into tiles, against transformers: positions, tokens, the exported vision tower."""

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

from checkpoints import TEXT_TYPES, TILED_TYPES, TOKEN_IDS, tiny_config, tiny_model
from patching import apply
from surgeon import models
from surgeon.errors import FamilyError, InputError
from surgeon.families import TileLayout, family

IMAGE = TOKEN_IDS["image_token_id"]
SIDE = 3
GRIDS = [(1, 1, 1), (1, 1, 2), (1, 3, 2)]


@pytest.fixture(scope="module", params=TILED_TYPES)
def model(request):
    return tiny_model(request.param)


def family_of(model):
    return family(model.config.model_type)


def tiles(grid):
    return grid[1] * grid[2] + (grid != (1, 1, 1))


def image(grid, seed=0, size=42):
    return np.random.default_rng(seed).standard_normal((tiles(grid), 3, size, size), dtype=np.float32)


def prompt_rows(rng, grids):
    """A row's ids: text around its images, which may come first or last."""
    row = []
    for i, grid in enumerate(grids):
        row += rng.integers(0, 1900, rng.integers(1 if i else 0, 6)).tolist() + [IMAGE] * (tiles(grid) * SIDE**2)
    return row + rng.integers(0, 1900, rng.integers(0 if grids else 1, 6)).tolist()


def padded(rows, side):
    length = max(map(len, rows))
    ids, mask = np.full((len(rows), length), 7), np.zeros((len(rows), length), dtype=np.int64)
    for i, row in enumerate(rows):
        where = slice(length - len(row), None) if side == "left" else slice(len(row))
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


def test_what_the_family_says_of_a_config(model):
    model_family = family_of(model)
    layout = model_family.tile_layout(model.config)
    assert layout == TileLayout(SIDE, "first" if model_family.model_type == "ovis2" else "last")
    assert [layout.tiles(grid) for grid in GRIDS] == [1, 3, 7]
    assert [model_family.image_tokens(model.config, grid) for grid in GRIDS] == [9, 27, 63]
    assert model_family.visual_token_ids(model.config) == (IMAGE,)
    assert model_family.deepstack_layers(model.config) == 0
    assert isinstance(model, getattr(transformers, model_family.model_class))
    assert isinstance(model.config, getattr(transformers, model_family.config_class))
    for path in (model_family.vision_tower, model_family.projector, model_family.text_model, model_family.lm_head):
        assert sum(p.numel() for p in model.get_submodule(path).parameters()) > 0


@pytest.mark.parametrize(
    ("text_type", "head_dim"), [("llama", 32), ("llama", None), ("qwen2", 32), ("qwen2", None), ("qwen3", 32)]
)
def test_text_models(text_type, head_dim):
    config = tiny_config("internvl", text_type=text_type, head_dim=head_dim)
    model_family = family("internvl")
    attention = models.build_meta(config).model.language_model.layers[0].self_attn
    assert model_family.head_dim(config) == attention.head_dim == (head_dim or 16)
    assert model_family.text_config(config).model_type == text_type


def test_another_text_model_is_refused():
    config = tiny_config("internvl", text_type="olmo")
    with pytest.raises(FamilyError, match="'olmo' is not supported; supported: llama, qwen2, qwen3"):
        family("internvl").head_dim(config)


# ---------------------------------------------------------------- decoder positions


@pytest.mark.parametrize(
    ("ids", "grids", "message"),
    [
        ([5, *[IMAGE] * 8, 6], [[(1, 1, 1)]], "row 0 has 8 image token.s., its 1 image.s. become 9"),
        ([5, *[IMAGE] * 9], [[]], "row 0 has 9 image token.s., its 0 image.s. become 0"),
        ([5, *[IMAGE] * 18], [[(1, 1, 2)]], "has 18 image token.s., its 1 image.s. become 27"),
        ([5], [], "for 0 row.s. were given, the batch has 1"),
    ],
)
def test_tokens_and_grids_that_disagree(model, ids, grids, message):
    batch = np.array([ids])
    with pytest.raises(InputError, match=message):
        family_of(model).position_ids(model.config, batch, np.ones_like(batch), grids)


def test_a_row_without_tokens(model):
    ids = np.array([[5], [5]])
    with pytest.raises(InputError, match="row 1 has no tokens"):
        family_of(model).position_ids(model.config, ids, np.array([[1], [0]]), [[], []])


# ---------------------------------------------------------------- tiles


@pytest.mark.parametrize(
    ("shape", "grid", "message"),
    [
        ((4, 3, 42, 42), (1, 2, 2), "2 x 2 tiles was given as 4 tile.s., expected 5, one short: the thumbnail is"),
        ((6, 3, 42, 42), (1, 2, 2), "given as 6 tile.s., expected 5$"),
        ((2, 3, 42, 42), (1, 1, 1), "given as 2 tile.s., expected 1$"),
        ((3, 3, 28, 42), (1, 2, 1), "tiles are 28 x 42 pixels, the vision tower takes 42 x 42"),
        ((2, 3, 42, 42), (2, 1, 1), "2 frames: video is not supported yet"),
    ],
)
def test_tiles_that_are_no_image(model, shape, grid, message):
    with pytest.raises(InputError, match=message):
        family_of(model).vision_inputs(model.config, np.zeros(shape, dtype=np.float32), grid)


# ---------------------------------------------------------------- vision export


def run_export(export, pixels):
    with torch.no_grad():
        outputs = export.module(torch.from_numpy(pixels))
    return dict(zip(export.output_names, outputs, strict=True))["features"]


def features_of(model, pixels):
    with torch.no_grad():
        return model.model.get_image_features(torch.from_numpy(pixels)).pooler_output.flatten(0, 1)


@pytest.mark.parametrize("grid", GRIDS)
def test_export_module_computes_the_vision_tower(model, grid):
    model_family = family_of(model)
    pixels = image(grid)
    assert model_family.vision_inputs(model.config, pixels, grid).keys() == {"pixel_values"}
    export = model_family.vision_export(model, torch.float32)
    expected = features_of(model, pixels)
    assert expected.std() > 0.3
    torch.testing.assert_close(run_export(export, pixels), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("vision", "options"),
    [
        ({"attention_bias": False}, {}),
        ({"norm_type": "rms_norm", "use_qk_norm": True}, {}),
        ({"use_absolute_position_embeddings": False, "use_mask_token": True}, {}),
        ({"use_mean_pooling": False}, {}),
        ({"use_mean_pooling": False}, {"vision_feature_layer": -2}),
        ({}, {"vision_feature_layer": 1}),
        ({"image_size": 56}, {"downsample_ratio": 0.25}),
    ],
)
def test_internvl_towers_of_every_kind(vision, options):
    model = tiny_model("internvl", vision=vision, top=options)
    model_family, pixels = family("internvl"), image((1, 1, 2), size=vision.get("image_size", 42))
    features = run_export(model_family.vision_export(model, torch.float32), pixels)
    torch.testing.assert_close(features, features_of(model, pixels), rtol=1e-5, atol=1e-5)
    assert len(features) == model_family.image_tokens(model.config, (1, 1, 2))


def test_torch_export_from_meta_takes_any_number_of_tiles(model):
    model_family = family_of(model)
    with torch.device("meta"):
        empty = type(model)._from_config(model.config, dtype=torch.float32)
    export = model_family.vision_export(empty, torch.float32)
    assert all(tensor.is_meta for tensor in export.example.values())
    program = torch.export.export(export.module, (), export.example, dynamic_shapes=export.dynamic_shapes, strict=False)
    assert set(program.state_dict) == set(export.parameters)
    # the same program with weights: it holds for other numbers than the example's
    real = model_family.vision_export(model, torch.float32)
    program = torch.export.export(real.module, (), real.example, dynamic_shapes=real.dynamic_shapes, strict=False)
    for grid in GRIDS:
        pixels = image(grid)
        with torch.no_grad():
            features = program.module()(pixel_values=torch.from_numpy(pixels))[0]
        torch.testing.assert_close(features, run_export(real, pixels), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vision_feature_layer": [-1, -2]}, r"vision_feature_layer \[-1, -2\]"),
        ({"vision_feature_select_strategy": "full"}, "'full' cannot be exported"),
    ],
)
def test_internvl_features_that_cannot_be_exported(options, message):
    model = tiny_model("internvl", top=options)
    with pytest.raises(FamilyError, match=message):
        family("internvl").vision_export(model, torch.float32)


@pytest.mark.parametrize("options", [{"qkv_bias": False, "mlp_bias": True}, {"tokenize_function": "st_argmax"}])
def test_ovis2_towers_of_every_kind(options):
    model = tiny_model("ovis2", vision=options)
    pixels = image((1, 1, 2))
    features = run_export(family("ovis2").vision_export(model, torch.float32), pixels)
    torch.testing.assert_close(features, features_of(model, pixels), rtol=1e-5, atol=1e-5)


def test_a_random_vocabulary_cannot_be_exported():
    model = tiny_model("ovis2", vision={"tokenize_function": "gumbel_argmax"})
    with pytest.raises(FamilyError, match="'gumbel_argmax' cannot be exported: it is random"):
        family("ovis2").vision_export(model, torch.float32)


def test_indicators_are_embedded_as_transformers_does():
    model = tiny_model("ovis2")
    model_family = family("ovis2")
    indicators = model_family.indicator_token_ids(model.config)
    ids = torch.tensor([[*indicators, *[IMAGE] * 9, 5]])
    pixels = torch.from_numpy(image((1, 1, 1)))
    export = model_family.vision_export(model, torch.float32)
    assert export.output_names == ("features", "indicators") and len(indicators) == 5
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        embeds[0, 5:14], embeds[0, :5] = export.module(pixels)
        ours = model(inputs_embeds=embeds).logits
        theirs = model(input_ids=ids, pixel_values=pixels).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_model_of_another_dtype_is_refused(model):
    with pytest.raises(ValueError, match=r"make the model in torch\.float16"):
        family_of(model).vision_export(model, torch.float16)


# ---------------------------------------------------------------- patching


def batch_of(model, seed=0):
    """Two rows, the first with two images of different grids."""
    rng = np.random.default_rng(seed)
    grids = [[(1, 1, 2), (1, 1, 1)], []]
    ids, mask = padded([prompt_rows(rng, row) for row in grids], "left")
    pixels = np.concatenate([image(grid, seed) for grid in grids[0]])
    kwargs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    return {name: torch.from_numpy(array) for name, array in kwargs.items()}


@pytest.mark.parametrize("text_type", TEXT_TYPES)
@pytest.mark.parametrize(
    ("model_type", "layout"), [("internvl", "published"), ("internvl", "native"), ("ovis2", "native")]
)
def test_a_new_graft_changes_nothing_and_both_key_layouts_load(model_type, text_type, layout, tmp_path):
    """Keys as InternVL's are published (language_model.model.*), which transformers also writes, and as the modules
    are named (model.language_model.*)."""
    source = tiny_model(model_type, text_type=text_type)
    source.save_pretrained(tmp_path / "source", save_original_format=layout == "published")
    with safe_open(tmp_path / "source" / "model.safetensors", "pt") as file:
        published = "language_model.model.norm.weight" in file.keys()  # noqa: SIM118 (it is no dict)
    assert published == (layout == "published")
    apply(tmp_path / "source", tmp_path / "patched", "pvm:layers=1,3,latent=32")
    patched = models.load(tmp_path / "patched")
    kwargs = batch_of(source)
    with torch.no_grad():
        before, after = source(**kwargs).logits, patched(**kwargs).logits
        assert torch.equal(before, after) and before.std() > 1
        generated = [m.generate(**kwargs, max_new_tokens=6, do_sample=False, pad_token_id=0) for m in (source, patched)]
        assert torch.equal(*generated)
        for layer in (1, 3):
            patched.model.language_model.layers[layer].pvm.alpha.fill_(0.8)
        changed = patched(**kwargs).logits
    visual = kwargs["input_ids"] == IMAGE
    # text behind an image sees the memory; a row without images has none
    assert (changed - before)[0, ~visual[0] & (kwargs["attention_mask"][0] == 1)].abs().max() > 0.1
    assert torch.equal(changed[1], before[1])
