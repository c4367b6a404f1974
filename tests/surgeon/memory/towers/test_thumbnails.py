"""Towers that see an image's thumbnail: which tile that is, in whose row, and which layer the features come from."""

from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints import TILED_TYPES, tiny_model
from short_formers import one_request, square_images, tiny_former, tiny_queries, tower_of
from surgeon.memory.short_former import ShortFormer
from surgeon.memory.towers.ovis2 import shares_of_words

TOKENS = 9
"""Visual tokens of a tile."""
GRIDS = [[1, 2], [1, 1], [3, 2]]
TILES = [3, 1, 7]
EXACTLY = "donot_use_mm_for_euclid_dist"


def numbered_tiles(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.float32)[:, None, None, None].expand(count, 3, 42, 42)


def numbers(rows: list[list[Any]]) -> list[list[int]]:
    return [[int(image["pixel_values"].flatten()[0]) for image in images] for images in rows]


def row_of(*runs: int, gap: int = 2, length: int = 120) -> list[bool]:
    """A row with runs of visual tokens."""
    row = [False] * 3
    for run in runs:
        row += [True] * run + [False] * gap
    return row + [False] * (length - len(row))


def separated(*tiles: int, length: int = 120) -> list[bool]:
    """A row of images whose tiles have a single token between them, and images two."""
    row = [False]
    for count in tiles:
        row += ([True] * TOKENS + [False]) * count + [False]
    return row + [False] * (length - len(row))


def mask_of(model_type: str) -> Tensor:
    """Rows with an image of three tiles; with none; with one of a single tile and one of seven."""
    if model_type == "ovis2":
        return torch.tensor([separated(3), separated(), separated(1, 7)])
    return torch.tensor([row_of(27), row_of(), row_of(9, 63)])


THUMBNAILS = {"internvl": [[2], [], [3, 10]], "ovis2": [[0], [], [3, 4]]}


@pytest.mark.parametrize("with_grids", [False, True])
@pytest.mark.parametrize("model_type", TILED_TYPES)
def test_thumbnails_of_each_row(model_type: str, with_grids: bool) -> None:
    model: Any = tiny_model(model_type)
    kwargs = {"pixel_values": numbered_tiles(sum(TILES))}
    if with_grids:
        kwargs["tile_grids"] = torch.tensor(GRIDS)
    for mask in (mask_of(model_type), mask_of(model_type).roll(5, 1)):
        rows = tower_of(model_type).images_by_row(model.model, kwargs, mask)
        assert numbers(rows) == THUMBNAILS[model_type]
        assert all(image["pixel_values"].shape == (1, 3, 42, 42) for images in rows for image in images)


@pytest.mark.parametrize("model_type", TILED_TYPES)
def test_grids_tell_images_apart_where_runs_do_not(model_type: str) -> None:
    """Two images with no token between them."""
    model: Any = tiny_model(model_type)
    kwargs = {"pixel_values": numbered_tiles(4), "tile_grids": torch.tensor([[1, 1], [1, 2]])}
    rows = tower_of(model_type).images_by_row(model.model, kwargs, torch.tensor([row_of(36)]))
    assert numbers(rows) == ([[0, 3]] if model_type == "internvl" else [[0, 1]])


@pytest.mark.parametrize("model_type", TILED_TYPES)
def test_thumbnails_alone_in_the_sequence(model_type: str) -> None:
    """Of a model whose tiles go to the memory alone, before and after they are taken out of the call."""
    model: Any = tiny_model(model_type)
    tower, mask = tower_of(model_type), torch.tensor([row_of(9), row_of(), row_of(9, 9)])
    kwargs = {"pixel_values": numbered_tiles(sum(TILES)), "tile_grids": torch.tensor(GRIDS)}
    assert numbers(tower.images_by_row(model.model, kwargs, mask)) == THUMBNAILS[model_type]
    assert numbers(tower.images_by_row(model.model, {"pixel_values": numbered_tiles(3)}, mask)) == [[0], [], [1, 2]]


@pytest.mark.parametrize("model_type", TILED_TYPES)
@pytest.mark.parametrize(
    ("kwargs", "runs"),
    [
        ({"pixel_values": numbered_tiles(3)}, [18]),
        ({"pixel_values": numbered_tiles(2)}, [20]),
        ({"pixel_values": numbered_tiles(3), "tile_grids": torch.tensor([[1, 1]])}, [27]),
    ],
)
def test_tiles_that_do_not_match_the_tokens_are_refused(model_type: str, kwargs: Any, runs: list[int]) -> None:
    model: Any = tiny_model(model_type)
    with pytest.raises(ValueError, match=r"pixel_values has \d tiles of 9 visual tokens each, the images have"):
        tower_of(model_type).images_by_row(model.model, kwargs, torch.tensor([row_of(*runs)]))


def test_llava_onevisions_images() -> None:
    """A lone one in tiles, none, and two that are seen whole; tiles padded to a batch, and one after the other."""
    model: Any = tiny_model("llava_onevision")
    tower = tower_of("llava_onevision")
    sizes = torch.tensor([[42, 84], [42, 42], [90, 42]])
    mask = torch.tensor([row_of(36 + 6 * 13), row_of(), row_of(74)])
    padded = numbered_tiles(9).unflatten(0, (3, 3))
    kwargs = {"pixel_values": padded, "image_sizes": sizes, "batch_num_images": torch.tensor([1, 2])}
    assert numbers(tower.images_by_row(model.model, kwargs, mask)) == [[0], [], [3, 6]]
    kwargs["pixel_values"] = numbered_tiles(5)
    assert numbers(tower.images_by_row(model.model, kwargs, mask)) == [[0], [], [3, 4]]
    with pytest.raises(ValueError, match="do not fit rows"):
        tower.images_by_row(model.model, kwargs, mask[:, :50])
    with pytest.raises(ValueError, match="videos is not supported"):
        tower.images_by_row(model.model, kwargs | {"pixel_values_videos": padded}, mask)


def test_llava_onevisions_images_without_their_first_patch() -> None:
    """As the model has them with `vision_feature_select_strategy` default, though SigLIP has no class token there."""
    model: Any = tiny_model("llava_onevision", top={"vision_feature_select_strategy": "default"})
    kwargs, images = one_request(model, square_images(model, 6), tokens=36)
    assert [len(features) for features in model.model.get_image_features(**kwargs).pooler_output] == [36, 36]
    assert torch.equal(images[0]["pixel_values"], kwargs["pixel_values"][0, :1])


def test_llava_onevisions_lone_images_are_each_their_own_row() -> None:
    model: Any = tiny_model("llava_onevision")
    kwargs = {"pixel_values": numbered_tiles(6), "image_sizes": torch.tensor([[42, 84], [42, 84]])}
    mask = torch.tensor([row_of(114), row_of(114)])
    assert numbers(tower_of("llava_onevision").images_by_row(model.model, kwargs, mask)) == [[0], [3]]


@pytest.mark.parametrize(
    ("model_type", "vision"), [("internvl", {"use_mean_pooling": False}), ("internvl", {}), ("llava_onevision", {})]
)
@pytest.mark.parametrize("layer", [-1, -2, 2, 3])
def test_features_of_another_layer(model_type: str, vision: dict[str, Any], layer: int) -> None:
    """Copies of the patches come out as the model's features of that layer, normed where it is the last by name."""
    model: Any = tiny_model(model_type, vision=vision, top={"vision_feature_layer": layer})
    tower = tower_of(model_type)
    kwargs, images = one_request(model, square_images(model, 6, 6))
    with torch.no_grad():
        embedded = tower.embed(model.model, images[0]["pixel_values"])[0]
        blocks = list(model.model.get_submodule(tower.blocks))[: tower.depth(model.config)]
        encoded = tower.encode(model.model, blocks, images[:1], embedded)
        features = model.model.get_image_features(**kwargs).pooler_output[0]
        if model_type == "internvl":
            encoded = encoded[1:].reshape(3, 2, 3, 2, -1).permute(0, 2, 1, 3, 4).flatten(0, 3)
        projected = tower.project(model.model, encoded)
    torch.testing.assert_close(projected, features[: len(projected)], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["internvl", "llava_onevision"])
def test_features_of_several_layers_are_refused(model_type: str) -> None:
    model: Any = tiny_model(model_type, top={"vision_feature_layer": [-1, -2]})
    with pytest.raises(ValueError, match=r"vision_feature_layer is \[-1, -2\]: short memory takes features of one"):
        ShortFormer(tower_of(model_type), model.model, 2, None, 4, 4.0)


def test_another_tower_than_siglip_is_refused() -> None:
    config = tiny_model("llava_onevision").config
    config.vision_config.model_type = "clip_vision_model"
    with pytest.raises(ValueError, match="vision tower clip_vision_model: short memory takes siglip_vision_model"):
        tower_of("llava_onevision").width(config)


@pytest.mark.parametrize("function", ["softmax", "st_argmax", "gumbel_argmax"])
def test_ovis2s_words(function: str) -> None:
    """As the model's own tower chooses them, and with a gradient."""
    model: Any = tiny_model("ovis2", vision={"tokenize_function": function})
    former, queries = tiny_former(model), tiny_queries(model)
    _, images = one_request(model, square_images(model, 6))
    torch.manual_seed(0)
    latents = former(model.model, images, queries)
    table = model.model.visual_embeddings_table.weight
    is_one_word = (torch.cdist(latents, table, compute_mode=EXACTLY).amin(1) < 1e-5).all()
    assert bool(is_one_word) == (function != "softmax")
    latents.square().sum().backward()
    assert former.memory_init.grad is not None and former.memory_init.grad.abs().max() > 1e-6
    with pytest.raises(ValueError, match="tokenize_function 'sparsemax': softmax, st_argmax and gumbel_argmax are"):
        shares_of_words(torch.zeros(1, 2), "sparsemax")
