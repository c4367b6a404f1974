"""docs/bundle-runtime.md: its Python gives what the project and transformers compute; its example is worked again."""

import math
import re
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen3VLConfig
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from checkpoints import DEMO, has_tokenizer, tiny_config
from exporters.export import export_bundle
from exporters.onnxruntime import BundleRuntime
from patching import apply
from surgeon import models
from surgeon.families import family
from surgeon.inputs import Inputs, Prompt

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "bundle-runtime.md").read_text()
CODE: dict[str, Any] = {"math": math, "np": np}
for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
    exec(block, CODE)
EXAMPLE = TEXT[TEXT.index("## A worked example") :]
PROMPT = "Where is the square?"
GRIDS = [(2, 2), (2, 10), (4, 8), (8, 14), (18, 6), (26, 34)]


def table(text: str, first_cell: str) -> list[list[str]]:
    """The rows below a table's head, which begins with `first_cell`; their cells, without backticks."""
    lines = text[text.index(f"\n| {first_cell} |") + 1 :].split("\n\n")[0].splitlines()
    return [[cell.strip().replace("`", "") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def paragraph(title: str) -> str:
    """Of the worked example."""
    return EXAMPLE[EXAMPLE.index(f"**{title}.**") :].split("\n")[0]


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?[\d.]*\d", text)]


# -- rules -------------------------------------------------------------------------------------------------------------
def test_the_size_to_scale_to() -> None:
    generator = np.random.default_rng(0)
    for block, least, most in ((28, 3136, 1003520), (32, 4096, 9216), (32, 65536, 16777216)):
        for height, width in [(1, 1), (1, 199), (70, 150), (80, 48), *generator.integers(8, 1500, (500, 2)).tolist()]:
            if max(height, width) / min(height, width) < 200:
                expected = smart_resize(height, width, block, least, most)
                assert CODE["scaled_size"](height, width, block, least, most) == expected


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("places", [64, 256, 2304])
def test_inputs_of_qwen3_vl(grid: tuple[int, int], places: int) -> None:
    config = tiny_config("qwen3_vl", vision={"num_position_embeddings": places})
    pixels = np.zeros((grid[0] * grid[1], 1), dtype=np.float32)
    expected = family("qwen3_vl").vision_inputs(config, pixels, (1, *grid))
    positions = CODE["patch_positions"](*grid, 2)
    index, weight = CODE["learned_positions"](positions, *grid, math.isqrt(places))
    for name, array in (("position_ids", positions), ("pos_index", index), ("pos_weight", weight)):
        assert array.dtype == expected[name].dtype
        np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("window", [56, 112])
def test_inputs_of_qwen2_5_vl(grid: tuple[int, int], window: int) -> None:
    config = tiny_config("qwen2_5_vl", vision={"window_size": window})
    pixels = np.zeros((grid[0] * grid[1], 1), dtype=np.float32)
    expected = family("qwen2_5_vl").vision_inputs(config, pixels, (1, *grid))
    names = [cell[0].split()[0] for cell in table(TEXT[TEXT.index("vision.onnx: Qwen2.5-VL") :], "input")]
    assert set(names) == set(expected)
    order = ("window_index", "window_inverse", "window_kv_len", "window_gather", "window_scatter")
    for name, array in zip(order, CODE["windows"](*grid, 2, window // 14 // 2), strict=True):
        np.testing.assert_array_equal(array, expected[name])
    np.testing.assert_array_equal(CODE["patch_positions"](*grid, 2), expected["position_ids"])


def test_position_ids() -> None:
    config = tiny_config("qwen3_vl")
    image = config.image_token_id
    generator = np.random.default_rng(0)
    for _ in range(50):
        grids = [GRIDS[i] for i in generator.integers(0, len(GRIDS), generator.integers(0, 4))]
        row = [1] * int(generator.integers(1, 4))
        for rows, columns in grids:  # side by side now and then
            row += [image] * (rows * columns // 4) + [2] * int(generator.integers(0, 3))
        ids = np.array([row])
        expected, following = family("qwen3_vl").position_ids(
            config, ids, np.ones_like(ids), [[(1, *grid) for grid in grids]]
        )
        positions, n = CODE["position_ids"](row, image, grids, 2)
        np.testing.assert_array_equal(positions, expected)
        assert n == following[0]


def test_the_example_of_weights() -> None:
    example = TEXT[TEXT.index("An example of weights") :].split("\n")[0]
    row, column, rows, columns, side = (int(n) for n in numbers(example)[:5])
    index, weight = re.findall(r"`(\d[\d. ]*)`", example)
    expected = CODE["learned_positions"](np.array([[row, column]]), rows, columns, side)
    assert [int(n) for n in numbers(index)] == expected[0][0].tolist()
    np.testing.assert_allclose(numbers(weight), expected[1][0], atol=5e-7)


def test_the_defaults() -> None:
    rows = {cells[1]: cells[2] for cells in table(TEXT, "file | keys | default")}
    every = (
        Qwen2VLImageProcessorPil,
        GotOcr2ImageProcessorPil,
        Ovis2ImageProcessorPil,
        LlavaOnevisionImageProcessorPil,
    )
    for processor in (kind() for kind in every):
        assert processor.do_convert_rgb and processor.do_resize and processor.do_rescale and processor.do_normalize
        assert int(processor.resample) == 3 and processor.rescale_factor == 1 / 255
        for key in ("image_mean", "image_std"):
            assert numbers(rows[key]) == list(getattr(processor, key))
    qwen, internvl, ovis2, llava = (kind() for kind in every)
    assert numbers(rows["patch_size, merge_size, temporal_patch_size"]) == [
        qwen.patch_size,
        qwen.merge_size,
        qwen.temporal_patch_size,
    ]
    sizes = [cells[2] for cells in table(TEXT, "file | keys | default") if cells[1] == "size"]
    assert numbers(sizes[0]) == [qwen.size["shortest_edge"], qwen.size["longest_edge"]]
    for tiled in (internvl, ovis2, llava):
        assert numbers(sizes[1]) == [tiled.size["height"], tiled.size["width"]]
    assert numbers(rows["min_patches, max_patches (InternVL, Ovis2)"]) == [ovis2.min_patches, ovis2.max_patches]
    assert (internvl.min_patches, internvl.max_patches) == (ovis2.min_patches, ovis2.max_patches)
    assert rows["crop_to_patches, use_covering_area_grid (Ovis2)"] == "false, true"
    assert (ovis2.crop_to_patches, ovis2.use_covering_area_grid) == (False, True)
    newer, older = Qwen3VLConfig().vision_config, Qwen2_5_VLConfig().vision_config
    assert numbers(rows["spatial_merge_size (Qwen-VL)"]) == [newer.spatial_merge_size] == [older.spatial_merge_size]
    assert numbers(rows["num_position_embeddings (Qwen3-VL)"]) == [newer.num_position_embeddings]
    assert numbers(rows["patch_size, window_size (Qwen2.5-VL)"]) == [older.patch_size, older.window_size]


def test_links_lead_somewhere() -> None:
    anchors = {}
    for name in ("bundle", "bundle-runtime", "bundle-tiles", "vismem"):
        titles = re.findall(r"^#+ (.*)$", (DOCS / f"{name}.md").read_text(), re.MULTILINE)
        anchors[f"{name}.md"] = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    for name in anchors:
        for file, anchor in re.findall(r"\]\(([\w\-./]*)#?([\w-]*)\)", (DOCS / name).read_text()):
            assert not file or (DOCS / file).exists(), file
            assert not anchor or anchor in anchors[file or name], (name, file, anchor)


# -- the worked example ------------------------------------------------------------------------------------------------
needs_demo = pytest.mark.skipif(not has_tokenizer(), reason="the demo checkpoint is not there")


@pytest.fixture(scope="module")
def image() -> Image.Image:
    """By the formula in the page."""
    width, height = (int(n) for n in re.search(r"(\d+) x (\d+) pixels", EXAMPLE).groups())
    square, elsewhere = re.findall(r"^- `\((.*?)\)`(.*)[,.]$", EXAMPLE, re.MULTILINE)
    left, right, top, bottom = (int(n) for n in numbers(square[1]))
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    for y in range(height):
        for x in range(width):
            inside = left <= x < right and top <= y < bottom
            pixels[y, x] = eval((square if inside else elsewhere)[0], {"x": x, "y": y})
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def inputs(image: Image.Image) -> Any:
    return Inputs.from_directory(DEMO).prepare([Prompt(PROMPT, (image,))])


@needs_demo
def test_the_patches(image: Image.Image, inputs: Any) -> None:
    settings = Inputs.from_directory(DEMO).image_processor
    size = CODE["scaled_size"](
        image.height, image.width, 32, settings.size["shortest_edge"], settings.size["longest_edge"]
    )
    scaled = np.asarray(image.resize(size[::-1], 3), dtype=np.float64) * settings.rescale_factor
    pixels = (scaled.astype(np.float32) - np.float32(settings.image_mean)) / np.float32(settings.image_std)
    expected = inputs.pixel_values[0][0]
    np.testing.assert_array_equal(CODE["patches"](pixels, 16, 2, 2), expected)

    rows, columns = inputs.grids[0][0][1:]
    assert size == (rows * 16, columns * 16)
    most, (height, width) = settings.size["longest_edge"], (image.height, image.width)
    nearest = round(height / 32), round(width / 32)
    rounded = [height, 32, nearest[0], width, 32, nearest[1], nearest[0] * 32, nearest[1] * 32]
    shrink = round(math.sqrt(height * width / most), 3)
    merged = [rows // 2, columns // 2, rows // 2 * (columns // 2)]
    stated = [16, 2, 32, *rounded, nearest[0] * nearest[1] * 32**2, most, shrink, *size, rows, columns, *merged]
    assert numbers(paragraph("Size")) == stated
    shown, copies, green, blue = [0, 15], 16 * 16, 2 * 16 * 16, 2 * 2 * 16 * 16
    assert numbers(paragraph("Patches")) == [*expected.shape, 1536, 3, 2, 16, 16, *shown, copies, green, blue]
    head = EXAMPLE[EXAMPLE.index("| row | patch |") :].split("\n")[0]
    assert numbers(head) == [*shown, copies, green, blue]
    for cells in table(EXAMPLE, "row | patch"):
        row = int(cells[0])
        assert numbers(cells[1]) == CODE["patch_positions"](rows, columns, 2)[row].tolist()
        written = numbers(" ".join(cells[2:]))
        np.testing.assert_allclose(written, expected[row, [*shown, copies, green, blue]], atol=5.1e-5)


@needs_demo
def test_the_positions_of_the_patches(inputs: Any) -> None:
    config = Inputs.from_directory(DEMO).config
    expected = inputs.family.vision_inputs(config, inputs.pixel_values[0][0], inputs.grids[0][0])
    side, (rows, columns) = math.isqrt(config.vision_config.num_position_embeddings), inputs.grids[0][0][1:]
    assert numbers(paragraph("Positions of the patches")) == [side, side, side - 1, rows - 1, side - 1, columns - 1]
    rows = table(EXAMPLE, "row | `position_ids`")
    assert len(rows) == 8
    for row, *cells in rows:
        for name, cell in zip(("position_ids", "pos_index", "pos_weight"), cells, strict=True):
            np.testing.assert_allclose(numbers(cell), expected[name][int(row)], atol=5e-7)


@needs_demo
def test_the_prompt(image: Image.Image, inputs: Any) -> None:
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}]
    assert Inputs.from_directory(DEMO).render(messages) == re.search(r"```\n(.*?)```", EXAMPLE, re.DOTALL)[1][:-1]
    rows = table(EXAMPLE, "places")
    ids = [int(n) for cells in rows for n in numbers(cells[1])]
    assert [ids] == inputs.input_ids.tolist() and f"Its {len(ids)} tokens" in EXAMPLE
    expected, following = inputs.family.position_ids(
        Inputs.from_directory(DEMO).config, inputs.input_ids, inputs.attention_mask, inputs.grids
    )

    def axis(cell: str) -> list[int]:
        first, *rest = (int(n) for n in numbers(cell))
        return list(range(first, rest[0] + 1)) if " to " in cell else [first, *rest]

    for column in range(3):
        written = [axis(cells[2 + column]) for cells in rows]
        assert list(chain(*written[:-1])) == expected[column, 0].tolist() and written[-1] == following.tolist()
    assert list(chain(*(axis(cells[0]) for cells in rows[:-1]))) == list(range(len(ids)))


@needs_demo
def test_what_each_graph_is_fed(tmp_path: Path, inputs: Any) -> None:
    recipe = re.search(r"--pass (pvm:\S+)`", EXAMPLE)[1]
    apply(DEMO, tmp_path / "patched", recipe)
    export_bundle(tmp_path / "patched", tmp_path / "bundle", dtype=torch.float32, max_length=1024, digests=False)
    runtime = BundleRuntime(tmp_path / "bundle", provider="cpu")
    symbols = {"B": 1, "S": 26, "M": 8, "T": 1}
    for graph, *sides in table(EXAMPLE, "graph"):
        described = runtime.manifest.graphs[graph]
        for cell, ports in zip(sides, (described.inputs, described.outputs), strict=True):
            shapes = {port.name: [eval(str(size), symbols.copy()) for size in port.shape] for port in ports}
            shown = {name: [int(n) for n in numbers(shape)] for name, shape in re.findall(r"([\w.]+) \[(.*?)\]", cell)}
            assert shown.items() <= shapes.items()
            several = {name.split("_")[0] for name in shown if "." in name}
            assert all(name.split("_")[0] in several for name in shapes.keys() - shown.keys())

    state, _ = runtime.start(inputs)
    length, (places,) = int(state.lengths[0]), state.memory_places
    first, last = int(places[0]), int(places[-1])
    assert runtime.manifest.visibility == "causal" and places.tolist() == list(range(first, last + 1))
    sentences = EXAMPLE[EXAMPLE.index("In prefill") :].split("\n")[0]
    before = [0, length - 1, first, last, first - 1, first, last - 1, last, length - 1]
    assert numbers(sentences) == [*before, length, int(state.next_positions[0]), 1, 1, len(places)]


@needs_demo
def test_the_answer(inputs: Any) -> None:
    model = models.load(DEMO, dtype=torch.float32)
    kwargs = inputs.model_kwargs()
    with torch.no_grad():
        features = model.get_image_features(kwargs["pixel_values"], kwargs["image_grid_thw"]).pooler_output[0]
        generated = model.generate(
            **kwargs, max_new_tokens=32, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    written = numbers(paragraph("Answer").replace("fp32", ""))
    np.testing.assert_allclose(written, features[[0, -1], :4].flatten(), atol=1e-4)
    rows = EXAMPLE[EXAMPLE.index("| token |") :].splitlines()
    tokens, logits = (numbers(rows[i]) for i in (0, 2))
    ids = generated.sequences[0, inputs.input_ids.shape[1] :]
    assert tokens == ids.tolist()
    expected = [float(step[0, token]) for step, token in zip(generated.logits, ids, strict=True)]
    np.testing.assert_allclose(logits, expected, atol=1e-3)
    texts = [cell.strip().strip("`").replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", rows[3])[2:-1]]
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    assert texts == [tokenizer.decode([int(token)]).strip() for token in tokens]
