"""Images in tiles: a bundle places them in the sequence and in the memory as torch does, with both kinds of ids."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from exporters.onnxruntime import BundleRuntime
from exporters.runtime import ImageFeatures
from pairs import MIXIN, PLAIN, PVM, Pair, Row, image
from surgeon.errors import InputError
from surgeon.inputs import ModelInputs, Prompt
from surgeon.memory.rope_dhr import tile_position_ids
from surgeon.positions import Positions, position_ids

Export = Callable[..., Pair]
DHR = ("rope-dhr",)
STEPS = 64


def tiles(rows: int, columns: int, seed: int = 0) -> Image.Image:
    """An image that is cut into so many tiles of 42 x 42 pixels."""
    return image(42 * columns, 42 * rows, seed)


PROMPTS = [
    Prompt("What is it?", (tiles(2, 3),)),
    Prompt("A star is a"),
    Prompt("Compare them.", (tiles(1, 1, 1), tiles(3, 1, 2), tiles(2, 2, 3))),
]


def decode(runtime: BundleRuntime, inputs: ModelInputs, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Greedy tokens [B, steps] and logits [B, steps, V]."""
    state, last = runtime.start(inputs)
    logits = [last]
    while len(logits) < steps:
        logits.append(runtime.step(state, logits[-1].argmax(-1)))
    stacked = np.stack(logits, axis=1)
    return stacked.argmax(-1), stacked


def mixin(tiles: str) -> str:
    return f"{MIXIN[0]},tiles={tiles}"


@pytest.mark.parametrize(
    ("model_type", "recipe"),
    [
        ("internvl", PLAIN),
        ("internvl", (*MIXIN, *PVM, "rope-dhr:tile_order=column")),
        # causal, it comes to a token with two slots nearly tied: keys within fp32's 3e-6 then set logits 1.7e-4 apart
        ("ovis2", (f"{MIXIN[0]},visibility=all", *DHR)),
        ("internvl", (mixin("context"), *DHR)),
        ("internvl", (mixin("memory"), "rope-dhr:tile_order=column")),
        ("internvl", (mixin("memory"),)),
    ],
    ids=["internvl plain", "mixin pvm dhr", "ovis2 dhr", "context dhr", "memory dhr", "memory"],
)
def test_logits_and_greedy_tokens_are_those_of_torch(export: Export, model_type: str, recipe: tuple[str, ...]) -> None:
    pair = export(model_type, recipe)
    runtime = BundleRuntime(pair.bundle, threads=1)
    offered = runtime.manifest.positions is not None
    choices: tuple[Positions | None, ...] = ("dhr", "plain") if offered else (None,)
    logits_of = {}
    for positions in choices:
        tokens, logits = decode(runtime, runtime.prepare(PROMPTS, positions), STEPS)
        expected_tokens, expected = pair.greedy(pair.inputs.prepare(PROMPTS, positions=positions), STEPS)
        np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
        assert tokens.tolist() == expected_tokens.tolist()
        logits_of[positions] = logits
    if offered and runtime.manifest.allocation != "memory":  # whose sequence has no tiles to place
        assert np.abs(logits_of["dhr"] - logits_of["plain"])[[0, 2]].max() > 0.1
        np.testing.assert_array_equal(logits_of["dhr"][1], logits_of["plain"][1])
        assert np.array_equal(decode(runtime, runtime.prepare(PROMPTS), 1)[1], logits_of["dhr"][:, :1]), (
            "dhr by default"
        )
    assert runtime.decoder.rewrites["GroupedQueryAttention"] == 3


def test_the_manifest_says_where_tiles_go(export: Export) -> None:
    manifest = export("internvl", (mixin("memory"), "rope-dhr:tile_order=column")).manifest
    written = manifest.model_dump()
    assert written["layout"] == {"side": 3, "thumbnail": "last"} and written["allocation"] == "memory"
    assert written["positions"] == {"scheme": "rope_dhr", "tile_order": "column"}
    plain = export("internvl", PLAIN).manifest
    assert (plain.layout, plain.positions, plain.allocation) == (None, None, "both")


FIRST_TURN: list[Row] = [["one", tiles(2, 1, 1), "two three"], ["nothing to see"], ["see", tiles(1, 1, 2)]]
SECOND_TURN: list[Row] = [["and", tiles(1, 2, 3)], ["still nothing here, now longer"], [tiles(2, 2, 4), "so"]]


@pytest.mark.parametrize("allocation", ["both", "context"])
@pytest.mark.parametrize("positions", ["dhr", "plain"])
def test_a_later_turn_with_new_tiles(export: Export, allocation: str, positions: Positions) -> None:
    """As transformers has it, row by row, given the positions that both turns have together."""
    recipe = (mixin("context"), *DHR) if allocation == "context" else (*MIXIN, *PVM, "rope-dhr:tile_order=column")
    pair = export("internvl", recipe)
    runtime = BundleRuntime(pair.bundle, threads=1)
    state, logits = runtime.start(pair.raw(FIRST_TURN, positions=positions))
    answer = logits.argmax(-1)
    runtime.step(state, answer)
    turn_logits = runtime.append(state, pair.raw(SECOND_TURN, positions=positions), logits="all")
    after = runtime.step(state, answer)
    for row in range(3):
        turns = [pair.raw(turn[row : row + 1], positions=positions) for turn in (FIRST_TURN, SECOND_TURN)]
        ids = [
            position_ids(t.family, pair.inputs.config, t.input_ids, t.attention_mask, t.grids, positions) for t in turns
        ]
        begin = int(ids[0][1][0])
        end = begin + 1 + int(ids[1][1][0])
        token = torch.tensor([[answer[row]]])
        kwargs = turns[1].model_kwargs()
        del kwargs["attention_mask"]
        with torch.no_grad():
            cache = pair.model(**turns[0].model_kwargs(), use_cache=True).past_key_values
            pair.model(input_ids=token, position_ids=torch.tensor([[begin]]), past_key_values=cache)
            turn_positions = torch.from_numpy(ids[1][0][0] + begin + 1)
            expected = pair.model(**kwargs, position_ids=turn_positions, past_key_values=cache).logits.numpy()
            last = pair.model(input_ids=token, position_ids=torch.tensor([[end]]), past_key_values=cache).logits
        np.testing.assert_allclose(turn_logits[row, : expected.shape[1]], expected[0], atol=1e-4, rtol=0)
        np.testing.assert_allclose(after[row], last[0, 0].numpy(), atol=1e-4, rtol=0)
        assert state.next_positions[row] == end + 1


def test_what_enters_the_memory_alone_is_where_its_thumbnail_is(export: Export) -> None:
    """In a later turn too, whose positions continue."""
    runtime = BundleRuntime(export("internvl", (mixin("memory"), "rope-dhr:tile_order=column")).bundle, threads=1)
    side, count = 3, 9
    features = np.arange(7 * count * 2, dtype=np.float32).reshape(7 * count, 2)
    for start in (4, 40):
        shown = np.arange(start, start + count)[None]
        entering = runtime.placement.entering([ImageFeatures(features)], [(1, 2, 3)], shown, shown[0] + 7)
        tiles_at = tile_position_ids(2, 3, side, "column").flatten().numpy() + start
        assert entering is not None and entering.position_ids.tolist() == [[*tiles_at, *shown[0]]]
        assert np.array_equal(entering.embeds, features)
        assert np.array_equal(entering.places, entering.position_ids[0] + 7)
    assert np.array_equal(runtime.placement.in_sequence(ImageFeatures(features)).features, features[-count:])


def test_positions_that_a_bundle_does_not_offer(export: Export) -> None:
    runtime = BundleRuntime(export("internvl", PLAIN).bundle, threads=1)
    with pytest.raises(InputError, match="has no RoPE-DHR positions"):
        runtime.prepare(PROMPTS, "dhr")
    assert runtime.prepare(PROMPTS, "plain").positions is None


def test_images_that_are_not_those_of_the_prompt(export: Export) -> None:
    runtime = BundleRuntime(export("internvl", (*MIXIN, *PVM, "rope-dhr:tile_order=column")).bundle, threads=1)
    inputs = runtime.prepare(PROMPTS[:1])
    missing = dataclasses.replace(inputs, pixel_values=[[inputs.pixel_values[0][0][:-1]]])
    with pytest.raises(InputError, match="the thumbnail is missing"):
        runtime.start(missing)
    with pytest.raises(InputError, match=r"visual tokens left for an image|more than the prompts have"):
        runtime.start(dataclasses.replace(inputs, grids=[[(1, 3, 3)]]))
