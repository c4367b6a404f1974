"""Who sees an image in a bundle's memory: with `causal` a conversation has one answer, however it is fed."""

from collections.abc import Callable

import numpy as np
import pytest
from transformers import PretrainedConfig

from exporters.onnxruntime import BundleRuntime
from exporters.runtime import ImageFeatures
from exporters.runtime.placement import Placement
from pairs import MIXIN, PVM, Pair, Row, image
from surgeon.memory.patched import RECORD
from surgeon.memory.rope_dhr import TileOrder, offsets_from_thumbnail
from surgeon.memory.visibility import Visibility

Export = Callable[..., Pair]
FIRST: list[Row] = [
    ["one", image(64, 96, 1), "two three"],
    ["nothing to see, not yet"],
    ["see", image(64, 64, 2), "and", image(96, 64, 5), "so"],
]
SECOND: list[Row] = [["and", image(96, 96, 3), "four"], [image(64, 64, 4), "so"], ["no image here"]]
BUNDLES = [("qwen3_vl", PVM), ("qwen3_vl", MIXIN), ("internvl", (f"{MIXIN[0]},tiles=memory",))]
IDS = ["pvm", "mixin", "tiles in the memory"]


def opened(
    export: Export, model_type: str, recipe: tuple[str, ...], visibility: Visibility
) -> tuple[Pair, BundleRuntime]:
    pair = export(model_type, recipe, visibility=visibility)
    return pair, BundleRuntime(pair.bundle, threads=1)


def both(first: Row, second: Row) -> Row:
    """Two turns as one."""
    return [*first, *second]


def turn_by_turn(pair: Pair, runtime: BundleRuntime, first: list[Row], second: list[Row]) -> list[np.ndarray]:
    """Logits of each row's tokens, of both turns."""
    turns = [pair.raw(turn) for turn in (first, second)]
    state, before = runtime.start(turns[0], logits="all")
    after = runtime.append(state, turns[1], logits="all")
    return [
        np.concatenate((before[row, : turns[0].lengths[row]], after[row, : turns[1].lengths[row]]))
        for row in range(len(first))
    ]


def at_once(pair: Pair, runtime: BundleRuntime, rows: list[Row]) -> list[np.ndarray]:
    inputs = pair.raw(rows)
    _, logits = runtime.start(inputs, logits="all")
    return [logits[row, :length] for row, length in enumerate(inputs.lengths)]


def apart(outputs: list[np.ndarray], expected: list[np.ndarray]) -> float:
    assert [each.shape for each in outputs] == [each.shape for each in expected]
    return max(float(np.abs(a - b).max()) for a, b in zip(outputs, expected, strict=True))


@pytest.mark.parametrize(("model_type", "recipe"), BUNDLES, ids=IDS)
@pytest.mark.parametrize("visibility", ["causal", "all"])
def test_turn_by_turn_and_in_one_pass(
    export: Export, model_type: str, recipe: tuple[str, ...], visibility: Visibility
) -> None:
    """An image of the second turn is seen by the tokens of the first where all see it, in one pass alone."""
    pair, runtime = opened(export, model_type, recipe, visibility)
    rows = [both(*turns) for turns in zip(FIRST, SECOND, strict=True)]
    difference = apart(turn_by_turn(pair, runtime, FIRST, SECOND), at_once(pair, runtime, rows))
    assert difference < 1e-5 if visibility == "causal" else difference > 0.1


@pytest.mark.parametrize(("model_type", "recipe"), BUNDLES, ids=IDS)
@pytest.mark.parametrize("visibility", ["causal", "all"])
def test_what_comes_later_changes_nothing_before_it(
    export: Export, model_type: str, recipe: tuple[str, ...], visibility: Visibility
) -> None:
    """So a prompt's prefix may be shared: its tokens are the same without the image behind them."""
    pair, runtime = opened(export, model_type, recipe, visibility)
    row: Row = ["some words", image(64, 96, 1), "between them", image(96, 64, 2), "end"]
    (whole,) = at_once(pair, runtime, [row])
    moved = []
    for count in (1, 3):
        (prefix,) = at_once(pair, runtime, [row[:count]])
        moved.append(float(np.abs(whole[: len(prefix)] - prefix).max()))
    assert max(moved) < 1e-5 if visibility == "causal" else min(moved) > 0.1


@pytest.mark.parametrize(("model_type", "recipe"), BUNDLES, ids=IDS)
def test_a_row_is_the_same_alone_and_in_a_batch(export: Export, model_type: str, recipe: tuple[str, ...]) -> None:
    """Rows with two images, with one, and none at all, whose batch passes one slot that nobody sees."""
    pair, runtime = opened(export, model_type, recipe, "causal")
    alone = [at_once(pair, runtime, [row])[0] for row in FIRST]
    assert apart(at_once(pair, runtime, FIRST), alone) < 1e-5
    state, _ = runtime.start(pair.raw(FIRST))
    tokens = np.array([5, 6, 7])
    steps = [runtime.step(state, tokens) for _ in range(3)]
    for row, token in enumerate(tokens):
        state, _ = runtime.start(pair.raw(FIRST[row : row + 1]))
        for expected in steps:
            np.testing.assert_allclose(runtime.step(state, np.array([token]))[0], expected[row], atol=1e-5, rtol=0)


def test_a_step_is_the_next_token_of_a_prompt(export: Export) -> None:
    """It sees all of its row's images, and nothing of how it does is made anew from step to step."""
    pair, runtime = opened(export, "qwen3_vl", PVM, "causal")
    inputs = pair.raw([FIRST[0]])
    state, _ = runtime.start(inputs)
    tokens = [5, 300, 17, 9]
    logits, bindings = [], []
    for token in tokens:
        logits.append(runtime.step(state, np.array([token]))[0])
        bindings.append(state.binding)
    assert all(binding is bindings[0] for binding in bindings)
    other, _ = runtime.start(inputs)
    text = np.array([tokens])
    later = type(inputs)(inputs.family, text, np.ones_like(text), np.zeros_like(text), [[]], [[]])
    np.testing.assert_allclose(np.stack(logits), runtime.append(other, later, logits="all")[0], atol=1e-5, rtol=0)


def test_the_mask_is_of_each_token_where_that_matters(export: Export) -> None:
    shapes = {}
    visibilities: tuple[Visibility, ...] = ("all", "causal")
    for visibility in visibilities:
        pair, runtime = opened(export, "qwen3_vl", PVM, visibility)
        (port,) = [port for port in pair.manifest.graphs["decoder"].inputs if port.name == "memory_mask"]
        shapes[visibility] = port.shape
        assert pair.manifest.visibility == visibility and runtime.decoder.inputs["memory_mask"].shape == port.shape
    assert shapes == {"all": ["B", "M"], "causal": ["B", "S", "M"]}
    assert export("qwen3_vl", ()).manifest.visibility == "all", "no grafts, no memory"


# -- where slots stand -------------------------------------------------------------------------------------------
def test_slots_stand_where_their_tokens_do(export: Export) -> None:
    pair, runtime = opened(export, "qwen3_vl", PVM, "causal")
    turns = [pair.raw(turn) for turn in (FIRST, SECOND)]
    image = runtime.family.image_token_id(runtime.config)
    state, _ = runtime.start(turns[0])
    runtime.append(state, turns[1])
    for row in range(len(FIRST)):
        ids = np.concatenate([turn.input_ids[row, : turn.lengths[row]] for turn in turns])
        expected = np.flatnonzero(ids == image)
        assert state.memory_places[row, state.memory_mask[row]].tolist() == expected.tolist() and len(expected)


def placement_of(allocation: str, tile_order: TileOrder = "row") -> Placement:
    positions = {"scheme": "rope_dhr", "tile_order": tile_order}
    record = {"layout": {"side": 3, "thumbnail": "last"}, "allocation": allocation, "positions": positions}
    return Placement(PretrainedConfig(**{RECORD: record}))


@pytest.mark.parametrize("tile_order", ["row", "column"])
def test_tiles_in_the_memory_alone_stand_at_the_patches_they_cover(tile_order: TileOrder) -> None:
    features = np.zeros((7 * 9, 2), dtype=np.float32)
    places, positions = np.arange(4, 13), np.arange(40, 49)[None]
    memory_inputs = placement_of("memory", tile_order).entering(
        [ImageFeatures(features), ImageFeatures(features[:9])],
        [(1, 2, 3), (1, 1, 1)],
        np.concatenate((positions, positions + 20), 1),
        np.concatenate((places, places + 20)),
    )
    offsets = offsets_from_thumbnail(2, 3, 3, "last", tile_order).numpy()
    assert memory_inputs is not None and memory_inputs.places.tolist() == [*(4 + offsets), *range(24, 33)]
    assert memory_inputs.position_ids.tolist() == [[*(40 + offsets), *range(60, 69)]]
    assert memory_inputs.places[-18:-9].tolist() == places.tolist(), "the thumbnail's own"
    assert {4, 12} == {int(memory_inputs.places[:54].min()), int(memory_inputs.places[:54].max())}


def test_a_thumbnail_alone_in_the_memory_stands_at_its_own_places() -> None:
    features, places = np.zeros((3 * 9, 2), dtype=np.float32), np.arange(27) + 6
    memory_inputs = placement_of("context").entering([ImageFeatures(features)], [(1, 1, 2)], places[None] + 1, places)
    assert memory_inputs is not None and memory_inputs.places.tolist() == list(range(24, 33))
