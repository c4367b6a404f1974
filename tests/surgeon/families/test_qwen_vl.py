"""Both Qwen-VL families against transformers: the positions that the decoder gets, and the exported vision tower."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import vision_utils

from checkpoints import QWEN_TYPES, TOKEN_IDS, tiny_config, tiny_model
from surgeon.errors import InputError
from surgeon.families import family

IMAGE, VIDEO = TOKEN_IDS["image_token_id"], TOKEN_IDS["video_token_id"]
# merged sizes; the windows of Qwen2.5-VL span 4 x 4 of them
GRIDS = [(1, 2, 2), (1, 8, 8), (1, 4, 6), (1, 10, 14), (1, 16, 8), (1, 18, 20), (1, 2, 30)]

grids_of_images = st.builds(lambda h, w: (1, 2 * h, 2 * w), st.integers(1, 40), st.integers(1, 40))


@pytest.fixture(scope="module", params=QWEN_TYPES)
def model(request):
    return tiny_model(request.param)


def family_of(model):
    return family(model.config.model_type)


def image(config, grid, seed=0):
    vision = config.vision_config
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    generator = np.random.default_rng(seed)
    return generator.standard_normal((grid[1] * grid[2], patch), dtype=np.float32)


def prompt_rows(rng, grids):
    """A row's ids: text around its images, which may come first or last."""
    row = []
    for i, (t, h, w) in enumerate(grids):
        row += rng.integers(0, 1900, rng.integers(1 if i else 0, 6)).tolist() + [IMAGE] * (t * h * w // 4)
    return row + rng.integers(0, 1900, rng.integers(0 if grids else 1, 6)).tolist()


# ---------------------------------------------------------------- decoder positions


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("seed", range(5))
def test_position_ids_are_those_of_transformers(model, side, seed):
    rng = np.random.default_rng(seed)
    grids = [[GRIDS[i] for i in rng.integers(0, len(GRIDS), n)] for n in (1, 3, 0, 2)]
    rows = [prompt_rows(rng, row) for row in grids]
    length = max(map(len, rows))
    ids, mask = np.full((len(rows), length), 7), np.zeros((len(rows), length), dtype=np.int64)
    for i, row in enumerate(rows):
        where = slice(length - len(row), None) if side == "left" else slice(len(row))
        ids[i, where], mask[i, where] = row, 1
    positions, following = family_of(model).position_ids(model.config, ids, mask, grids)
    expected, deltas = model.model.get_rope_index(
        torch.from_numpy(ids),
        mm_token_type_ids=torch.from_numpy((ids == IMAGE).astype(np.int64)),
        image_grid_thw=torch.tensor([grid for row in grids for grid in row]),
        attention_mask=torch.from_numpy(mask),
    )
    assert positions.dtype == following.dtype == np.int64
    np.testing.assert_array_equal(positions, expected.numpy())
    np.testing.assert_array_equal(following, deltas[:, 0].numpy() + mask.sum(1))


def test_images_side_by_side_follow_each_other(model):
    ids = np.array([[IMAGE] * 4 + [IMAGE] * 6])
    positions, following = family_of(model).position_ids(model.config, ids, np.ones_like(ids), [[(1, 4, 4), (1, 4, 6)]])
    assert positions[:, 0, 3].tolist() == [0, 1, 1]
    assert positions[:, 0, 4].tolist() == [2, 2, 2]
    assert following.tolist() == [5]


@pytest.mark.parametrize(
    ("ids", "grids", "message"),
    [
        ([5, IMAGE, IMAGE, 6], [(1, 4, 4)], "row 0 has 2 image token.s. too few for image 1"),
        ([5] + [IMAGE] * 4, [], "more than its 0 image"),
        ([5, 6], [(1, 4, 4)], "image tokens for 0 image.s., but 1 were given"),
        ([5, VIDEO], [], "video is not supported yet"),
    ],
)
def test_tokens_and_grids_that_disagree(model, ids, grids, message):
    batch = np.array([ids])
    with pytest.raises(InputError, match=message):
        family_of(model).position_ids(model.config, batch, np.ones_like(batch), [grids])


@pytest.mark.parametrize("sections", [[24, 20, 20], [22, 21, 21], [32, 20, 12], [28, 15, 21]])
def test_interleaved_sections_of_any_length(sections):
    """Time, height, width in turn, each as often as its own section says: as transformers lays the angles out."""
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": sections, "mrope_interleaved": True}
    config = tiny_config("qwen3_vl", hidden_size=256, num_attention_heads=2, head_dim=128, rope_parameters=rope)
    axes = family("qwen3_vl").rope_axes(config)
    assert [axes.count(axis) for axis in range(3)] == sections
    rotary = transformers.models.qwen3_vl.modeling_qwen3_vl.Qwen3VLTextRotaryEmbedding(config.text_config)
    positions = torch.tensor([3, 50, 700])
    cos, sin = rotary(torch.zeros(1), positions[:, None, None])
    angles = positions[torch.tensor(axes)] * rotary.inv_freq
    torch.testing.assert_close(cos[0, 0, :64], angles.cos())
    torch.testing.assert_close(sin[0, 0, :64], angles.sin())


@pytest.mark.parametrize("sections", [[24, 20, 20], [16, 24, 24]])
def test_rope_axes_at_the_published_size(sections):
    name = "qwen3_vl" if sections[0] == 24 else "qwen2_5_vl"
    config = tiny_config(name, hidden_size=256, num_attention_heads=2, head_dim=128)
    config.text_config.rope_parameters["mrope_section"] = sections
    axes = family(name).rope_axes(config)
    assert [axes.count(axis) for axis in range(3)] == sections
    assert axes[:4] == ([0, 1, 2, 0] if name == "qwen3_vl" else [0, 0, 0, 0])


def test_deepstack_and_token_ids(model):
    model_family = family_of(model)
    assert model_family.deepstack_layers(model.config) == (2 if model_family.model_type == "qwen3_vl" else 0)
    assert model_family.visual_token_ids(model.config) == (IMAGE, VIDEO)
    assert model_family.image_tokens(model.config, (1, 6, 8)) == 12
    tokenizer = SimpleNamespace(convert_ids_to_tokens={IMAGE: "<i>"}.get)
    assert model_family.expand_placeholder(model.config, (1, 2, 4), tokenizer) == "<i><i>"
    assert isinstance(model, getattr(transformers, model_family.model_class))
    assert isinstance(model.config, getattr(transformers, model_family.config_class))


# ---------------------------------------------------------------- vision inputs


@settings(deadline=None, max_examples=100)
@given(grid=grids_of_images, side=st.sampled_from([8, 48]))
def test_qwen3_vision_inputs_are_those_of_transformers(grid, side):
    config = tiny_config("qwen3_vl", vision={"num_position_embeddings": side**2})
    inputs = family("qwen3_vl").vision_inputs(config, np.empty((grid[1] * grid[2], 0)), grid)
    thw = torch.tensor([grid])
    index, weight = vision_utils.get_vision_interpolation_indices_and_weights(
        thw, side, mode="bilinear", align_corners=True, spatial_merge_size=2
    )
    np.testing.assert_array_equal(inputs["position_ids"], vision_utils.get_vision_position_ids(thw, 2).numpy())
    np.testing.assert_array_equal(inputs["pos_index"], index.numpy())
    np.testing.assert_array_equal(inputs["pos_weight"], weight.numpy())
    assert inputs["pos_weight"].dtype == np.float32


@settings(deadline=None, max_examples=100)
@given(grid=grids_of_images)
def test_qwen2_5_vision_inputs_are_those_of_transformers(grid):
    config = tiny_config("qwen2_5_vl")
    patches = grid[1] * grid[2]
    inputs = family("qwen2_5_vl").vision_inputs(config, np.empty((patches, 0)), grid)
    thw = torch.tensor([grid])
    order, boundaries = vision_utils.get_vision_window_index(thw, 2, 112, 14)
    np.testing.assert_array_equal(inputs["position_ids"], vision_utils.get_vision_position_ids(thw, 2).numpy())
    np.testing.assert_array_equal(inputs["window_index"], order.numpy())
    np.testing.assert_array_equal(inputs["window_inverse"], torch.argsort(order).numpy())
    np.testing.assert_array_equal(inputs["window_kv_len"], boundaries.diff().numpy())
    gather, scatter = inputs["window_gather"], inputs["window_scatter"]
    assert gather.shape == (len(boundaries) - 1, 64)
    # every patch is in its own window's row, in order, and is read back from there
    np.testing.assert_array_equal(gather.ravel()[scatter], np.arange(patches))
    np.testing.assert_array_equal(scatter // 64, np.repeat(np.arange(len(gather)), inputs["window_kv_len"]))


@pytest.mark.parametrize(
    ("grid", "message"), [((2, 4, 4), "video"), ((1, 3, 4), "not divisible"), ((1, 4, 8), "32 patches")]
)
def test_grids_that_are_no_image(model, grid, message):
    with pytest.raises(InputError, match=message):
        family_of(model).vision_inputs(model.config, np.zeros((16, 4)), grid)


# ---------------------------------------------------------------- vision export


def run_export(export, inputs):
    with torch.no_grad():
        outputs = export.module(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    return dict(zip(export.output_names, outputs, strict=True))


@pytest.mark.parametrize("grid", GRIDS)
def test_export_module_computes_the_vision_tower(model, grid):
    model_family = family_of(model)
    export = model_family.vision_export(model, torch.float32)
    pixels = image(model.config, grid)
    outputs = run_export(export, model_family.vision_inputs(model.config, pixels, grid))
    with torch.no_grad():
        expected = model.model.visual(torch.from_numpy(pixels), grid_thw=torch.tensor([grid]))
    assert expected.pooler_output.std() > 0.3
    torch.testing.assert_close(outputs["features"], expected.pooler_output, rtol=1e-5, atol=1e-5)
    if model_family.deepstack_layers(model.config):
        torch.testing.assert_close(outputs["deepstack"], torch.stack(expected.deepstack_features), rtol=1e-5, atol=1e-5)
    else:
        assert set(outputs) == {"features"}


def test_export_names_every_parameter_of_the_tower(model):
    export = family_of(model).vision_export(model, torch.float32)
    whole = {name: p for name, p in model.named_parameters() if name.startswith("model.visual.")}
    assert sorted(export.parameters.values()) == sorted(whole)
    for name, parameter in export.module.named_parameters():
        source = whole[export.parameters[name]]
        assert parameter.data_ptr() == source.data_ptr() and parameter.numel() == source.numel(), name
    assert dict(export.module.named_buffers()).keys() == export.constants.keys() == {"inv_freq"}
    assert torch.equal(export.constants["inv_freq"], model.model.visual.rotary_pos_emb.inv_freq)


def test_torch_export_from_meta_takes_any_image(model):
    model_family = family_of(model)
    with torch.device("meta"):
        empty = type(model)._from_config(model.config, dtype=torch.float32)
    export = model_family.vision_export(empty, torch.float32)
    assert all(tensor.is_meta for tensor in export.example.values())
    program = torch.export.export(export.module, (), export.example, dynamic_shapes=export.dynamic_shapes, strict=False)
    assert set(program.state_dict) == set(export.parameters)
    # the same program with weights: it holds for another size than the example's
    real = model_family.vision_export(model, torch.float32)
    program = torch.export.export(real.module, (), real.example, dynamic_shapes=real.dynamic_shapes, strict=False)
    grid = (1, 10, 18)
    inputs = model_family.vision_inputs(model.config, image(model.config, grid), grid)
    with torch.no_grad():
        outputs = program.module()(**{k: torch.from_numpy(v) for k, v in inputs.items()})
    torch.testing.assert_close(outputs[0], run_export(real, inputs)["features"], rtol=0, atol=1e-6)


def test_model_of_another_dtype_is_refused(model):
    with pytest.raises(ValueError, match=r"make the model in torch\.float16"):
        family_of(model).vision_export(model, torch.float16)
