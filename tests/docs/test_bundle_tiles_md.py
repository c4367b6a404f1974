"""docs/bundle-tiles.md: its Python and its words give what the families and transformers' image processors compute."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.image_processing_utils import select_best_resolution
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil, get_min_tile_covering_grid

from checkpoints import demo_tokenizer, has_tokenizer, tiny_config
from surgeon.families import family
from surgeon.families.ovis2 import FAMILY as OVIS2

TEXT = (Path(__file__).parents[2] / "docs" / "bundle-tiles.md").read_text()
CODE: dict[str, Any] = {"math": math, "np": np}
for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
    exec(block, CODE)
SIZE = {"size": {"height": 42, "width": 42}}
# width, height: wide, high, of equal sides, one tile, less than a tile
SIZES = [(130, 40), (53, 200), (126, 126), (42, 42), (31, 17), (400, 410), (97, 64)]
PINPOINTS = LlavaOnevisionImageProcessorPil().image_grid_pinpoints


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def normalised(processor: Any, images: list[Image.Image]) -> np.ndarray:
    pixels = np.stack([np.asarray(image, dtype=np.float64) * processor.rescale_factor for image in images])
    pixels = (pixels.astype(np.float32) - np.float32(processor.image_mean)) / np.float32(processor.image_std)
    return pixels.transpose(0, 3, 1, 2)


def cut(image: Image.Image, tile: int = 42) -> list[Image.Image]:
    """Row by row."""
    corners = [(x, y) for y in range(0, image.height, tile) for x in range(0, image.width, tile)]
    return [image.crop((x, y, x + tile, y + tile)) for x, y in corners]


def test_the_choice_of_tiles() -> None:
    generator = np.random.default_rng(0)
    for height, width in [*generator.integers(20, 3000, (400, 2)).tolist(), (448, 448), (500, 1000), (300, 1200)]:
        for most in (6, 9, 12):
            columns, rows = get_optimal_tiled_canvas((height, width), (448, 448), 1, most)
            assert CODE["internvl_tiles"](height, width, 448, 448, 1, most) == (rows, columns)
            columns, rows = get_min_tile_covering_grid((height, width), 448, most)
            assert CODE["ovis2_tiles"](height, width, 448, most) == (rows, columns)
        assert tuple(CODE["llava_size"](height, width, PINPOINTS)) == select_best_resolution((height, width), PINPOINTS)


@pytest.mark.parametrize("model_type", ["internvl", "ovis2", "ovis2 without covering"])
@pytest.mark.parametrize("size", SIZES)
def test_tiles_and_thumbnail(model_type: str, size: tuple[int, int]) -> None:
    image, most = noise(*size), 6
    name, _, plain = model_type.partition(" ")
    if name == "internvl":
        processor = GotOcr2ImageProcessorPil(**SIZE, max_patches=most)
    else:
        processor = Ovis2ImageProcessorPil(
            **SIZE, max_patches=most, crop_to_patches=True, use_covering_area_grid=not plain
        )
    if model_type == "ovis2":
        rows, columns = CODE["ovis2_tiles"](image.height, image.width, 42, most)
    else:
        rows, columns = CODE["internvl_tiles"](image.height, image.width, 42, 42, 1, most)
    images, thumbnail = cut(image.resize((42 * columns, 42 * rows), 3)), image.resize((42, 42), 3)
    if len(images) > 1:
        images = [*images, thumbnail] if name == "internvl" else [thumbnail, *images]
    pixels, grid = family(name).process_image(tiny_config(name), processor, image)
    assert grid == (1, rows, columns)
    np.testing.assert_array_equal(normalised(processor, images), pixels)


def test_the_side_in_visual_tokens() -> None:
    for name, sizes in (("internvl", {"image_size": [448, 448], "patch_size": [14, 14]}), ("ovis2", {})):
        config = tiny_config(name, vision=sizes)
        vision = config.vision_config
        if name == "internvl":
            side = int(vision.image_size[0] // vision.patch_size[0] * config.downsample_ratio)
            assert side == 16  # as the page says of the defaults
        else:
            side = vision.image_size // vision.patch_size // vision.hidden_stride
        assert family(name).tile_layout(config).side == side  # type: ignore[union-attr]


@pytest.mark.parametrize("size", SIZES)
def test_llava_onevision_alone(size: tuple[int, int]) -> None:
    image, config = noise(*size), tiny_config("llava_onevision")
    processor = LlavaOnevisionImageProcessorPil(**SIZE, image_grid_pinpoints=config.image_grid_pinpoints)
    height, width = CODE["llava_size"](image.height, image.width, config.image_grid_pinpoints)
    h, w = CODE["llava_fitted"](image.height, image.width, height, width)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image.resize((w, h), 3), ((width - w) // 2, (height - h) // 2))
    described = family("llava_onevision")
    pixels, grid = described.process_image(config, processor, image)
    np.testing.assert_array_equal(normalised(processor, [image.resize((42, 42), 3), *cut(canvas)]), pixels)

    expected = described.vision_inputs(config, pixels, grid)
    index, weight = CODE["llava_features"](image.height, image.width, height // 42, width // 42, 6, 4)
    assert len(index) == described.image_tokens(config, grid)
    assert (index.dtype, weight.dtype) == (np.int64, np.float32)
    np.testing.assert_array_equal(weight, expected["feature_weight"])
    taken = weight > 0  # which feature nothing is taken of does not matter
    np.testing.assert_array_equal(index[taken], expected["feature_index"][taken])


@pytest.mark.parametrize("size", SIZES)
def test_llava_onevision_among_several(size: tuple[int, int]) -> None:
    image, config = noise(*size), tiny_config("llava_onevision")
    processor = LlavaOnevisionImageProcessorPil(**SIZE, image_grid_pinpoints=config.image_grid_pinpoints)
    longer, (width, height) = max(size), size
    square = Image.new("RGB", (longer, longer), tuple(int(mean * 255) for mean in processor.image_mean))
    square.paste(image, ((longer - width) // 2, (longer - height) // 2))
    described = family("llava_onevision")
    pixels, grid = described.process_image(config, processor, image, alone=False)
    np.testing.assert_array_equal(normalised(processor, [square.resize((42, 42), 3)]), pixels)
    expected = described.vision_inputs(config, pixels, grid)
    assert (
        expected["feature_index"][:, 0].tolist() == list(range(6 * 6 + 1))
        and not expected["feature_weight"][:, 1:].any()
    )


@pytest.mark.skipif(not has_tokenizer(), reason="the demo checkpoint, whose tokenizer it needs, is not there")
def test_the_tokens_of_ovis2() -> None:
    tokenizer = demo_tokenizer("ovis2")
    names = re.search(r"five tokens: (.*?)\.", TEXT)[1].split(", ")
    added = [f"<IMG_{name}>" for name in ("START", "GRID", "COL", "ROW", "END")]
    ids = tokenizer.convert_tokens_to_ids(added)
    image = tokenizer.convert_tokens_to_ids("<IMG_ATOM>")
    config = tiny_config("ovis2", token_ids={"image_token_id": image, "visual_indicator_token_ids": ids})
    shown = dict(zip(names, added, strict=True)) | {"I": "<IMG_ATOM>" * 9}
    lines = re.search(r"```\n(start .*?)```", TEXT, re.DOTALL)[1].splitlines()
    for line, grid in zip(lines, ((1, 1, 1), (1, 2, 2)), strict=True):
        written = "".join(shown[word] for word in line.split("  ")[0].split())
        assert written == OVIS2.expand_placeholder(config, grid, tokenizer)


def test_the_examples() -> None:
    internvl, ovis2, llava = (
        [int(n) for n in re.findall(r"\d+", example)]
        for example in re.findall(r"^An example: (.*)$", TEXT, re.MULTILINE)
    )
    width, height, least, most, tile, *result = internvl
    rows, columns = CODE["internvl_tiles"](height, width, tile, tile, least, most)
    assert result == [rows, columns, rows * columns + 1, (rows * columns + 1) * 16**2]
    width, height, tile, most, *result = ovis2
    rows, columns = CODE["ovis2_tiles"](height, width, tile, most)
    assert result == [rows, columns, rows * columns + 1]
    width, height, tile, _, _, _, *result = llava
    target = CODE["llava_size"](height, width, PINPOINTS)
    fitted = CODE["llava_fitted"](height, width, *target)
    rows, columns = (length // tile for length in target)
    index, _ = CODE["llava_features"](height, width, rows, columns, 27, 9)
    kept = (len(index) - 27**2) // (27 * columns + 1)
    images = [rows, columns, 1 + rows * columns]
    assert result == [*target[::-1], *fitted[::-1], *images, kept, 27 * rows, 27**2, kept, 27 * columns + 1, len(index)]
