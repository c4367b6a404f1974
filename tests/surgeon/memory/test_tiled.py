"""Models whose images are tiles, with mixin layers and RoPE-DHR: positions and memory of whole requests.

The reference everywhere is the model itself without a cache, run anew for every token.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel

from checkpoints import has_tokenizer, tiny_checkpoint
from patching import apply, randomise_grafts
from surgeon import models
from surgeon.inputs import Inputs, Prompt
from surgeon.memory.rope_dhr import position_ids, tile_position_ids
from surgeon.positions import Positions

pytestmark = pytest.mark.skipif(not has_tokenizer(), reason="the demo checkpoint is not there")


def image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


TILED = Prompt("What is it?", (image(90, 42),))
WORDS = Prompt("hello there")
MIXED = Prompt("Compare them.", (image(42, 42, 1), image(90, 130, 2)))
PROMPTS = (TILED, WORDS, MIXED)
"""Images of 1 x 2 tiles; none; of one tile, and of 3 x 2."""


class Tiny:
    """A tiny patched InternVL whose grafts are as if trained."""

    def __init__(self, directory: Path, *passes: str, model_type: str = "internvl") -> None:
        source = tiny_checkpoint(directory / "source", model_type)
        apply(source, directory / "patched", *passes)
        self.model: PreTrainedModel = models.load(directory / "patched")
        randomise_grafts(self.model)
        self.inputs = Inputs.from_directory(directory / "patched")

    def kwargs(self, *prompts: Prompt, positions: Positions | None = None) -> dict[str, Any]:
        return self.inputs.prepare(prompts, positions=positions).model_kwargs()

    def generate(self, *prompts: Prompt, steps: int = 6, positions: Positions | None = None, **options: Any) -> Any:
        kwargs = self.kwargs(*prompts, positions=positions)
        generated = self.model.generate(
            **kwargs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, **options
        )
        return generated[:, kwargs["input_ids"].shape[1] :].tolist()

    @torch.no_grad()
    def recomputed(self, prompt: Prompt, steps: int = 6, positions: Positions | None = None) -> list[int]:
        """Greedy tokens without a cache."""
        kwargs = self.kwargs(prompt, positions=positions)
        ids, tokens = kwargs.pop("input_ids"), []
        for _ in range(steps):
            kwargs["attention_mask"] = torch.ones_like(ids)
            tokens.append(int(self.model(**kwargs, input_ids=ids, use_cache=False).logits[0, -1].argmax()))
            ids = torch.cat((ids, torch.tensor([tokens[-1:]])), 1)
        return tokens


@pytest.fixture(scope="module")
def dhr(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("dhr"), "mixin:every=2", "rope-dhr")


@pytest.mark.parametrize("passes", [("mixin:every=2",), ("mixin:layers=1", "pvm:layers=1,3,latent=32"), ("rope-dhr",)])
@pytest.mark.parametrize("text_type", ["llama", "qwen3"])
def test_identity_at_insertion(passes: Sequence[str], text_type: str, tmp_path: Path) -> None:
    """Mixed grids; with RoPE-DHR plain positions, and for images of one tile its own."""
    source = tiny_checkpoint(tmp_path / "source", "internvl", text_type=text_type)
    apply(source, tmp_path / "patched", *passes)
    plain, patched = models.load(source), models.load(tmp_path / "patched")
    before, after = (Inputs.from_directory(tmp_path / name) for name in ("source", "patched"))
    with torch.no_grad():
        same = plain(**before.prepare(PROMPTS).model_kwargs()).logits
        offered = "rope-dhr" in passes
        kwargs = after.prepare(PROMPTS, positions="plain" if offered else None).model_kwargs()
        assert torch.equal(patched(**kwargs).logits, same)
        one_tile = (WORDS, Prompt("One.", (image(42, 42),)))
        same = plain(**before.prepare(one_tile).model_kwargs()).logits
        assert torch.equal(patched(**after.prepare(one_tile).model_kwargs()).logits, same)
        if offered:
            tiled = patched(**after.prepare([TILED]).model_kwargs()).logits
            assert not torch.allclose(tiled, plain(**before.prepare([TILED]).model_kwargs()).logits, atol=0.1)


@pytest.mark.parametrize("positions", ["dhr", "plain"])
def test_generation_continues_from_the_last_id(dhr: Tiny, positions: Positions) -> None:
    """A batch padded left, with mixed grids and a row without images."""
    expected = [dhr.recomputed(prompt, positions=positions) for prompt in PROMPTS]
    assert dhr.generate(*PROMPTS, positions=positions) == expected


def test_positions_are_a_choice_of_the_request(dhr: Tiny) -> None:
    assert dhr.generate(MIXED) != dhr.generate(MIXED, positions="plain")
    assert dhr.generate(MIXED) == dhr.generate(MIXED, positions="dhr")


def test_beams_of_a_batch_are_those_of_each_row(dhr: Tiny) -> None:
    alone = [dhr.generate(prompt, num_beams=3)[0] for prompt in PROMPTS]
    assert dhr.generate(*PROMPTS, num_beams=3) == alone


@torch.no_grad()
def test_a_loop_that_gives_no_positions_continues_too(dhr: Tiny) -> None:
    outputs, tokens = dhr.model(**dhr.kwargs(MIXED), use_cache=True), []
    for _ in range(6):
        tokens.append(int(outputs.logits[0, -1].argmax()))
        outputs = dhr.model(
            input_ids=torch.tensor([tokens[-1:]]), past_key_values=outputs.past_key_values, use_cache=True
        )
    assert tokens == dhr.recomputed(MIXED)


@torch.no_grad()
def test_ids_that_jump_are_not_taken_for_packed_samples(dhr: Tiny) -> None:
    """Without a mask and a cache, transformers looks for packed samples in the position ids."""
    kwargs = dhr.kwargs(MIXED)
    with_mask = dhr.model(**kwargs, use_cache=False).logits
    del kwargs["attention_mask"]
    torch.testing.assert_close(dhr.model(**kwargs, use_cache=False).logits, with_mask, atol=1e-5, rtol=0)


@pytest.mark.parametrize("positions", ["dhr", "plain"])
@torch.no_grad()
def test_a_second_image_in_a_later_turn(dhr: Tiny, positions: Positions) -> None:
    first, second = (dhr.kwargs(prompt, positions=positions) for prompt in (TILED, MIXED))
    turn = dhr.model.generate(**first, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    ids = torch.cat((turn.sequences, second["input_ids"]), 1)
    grids = torch.cat((first["tile_grids"], second["tile_grids"]))
    generated = dhr.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=torch.cat((first["pixel_values"], second["pixel_values"])),
        tile_grids=grids,
        positions=positions,
        past_key_values=turn.past_key_values,
        max_new_tokens=4,
        do_sample=False,
    )[0, -4:].tolist()

    # by hand: the first turn's tokens one by one, then the second turn with its own images
    run = dhr.model(**first, use_cache=True)
    cache = run.past_key_values
    for token in turn.sequences[0, first["input_ids"].shape[1] : -1].tolist():
        dhr.model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
    known = cache.get_seq_length()
    positions_of_all = torch.arange(ids.shape[1])[None]
    if positions == "dhr":
        positions_of_all = position_ids(ids == dhr.model.config.image_token_id, None, grids, 3, "last")
    run = dhr.model(
        input_ids=ids[:, known:],
        pixel_values=second["pixel_values"],
        position_ids=positions_of_all[:, known:],
        past_key_values=cache,
        use_cache=True,
    )
    tokens, position = [], int(positions_of_all[0, -1])
    for _ in range(4):
        tokens.append(int(run.logits[0, -1].argmax()))
        position += 1
        step = {"input_ids": torch.tensor([tokens[-1:]]), "position_ids": torch.tensor([[position]])}
        run = dhr.model(**step, past_key_values=cache, use_cache=True)
    assert generated == tokens


@torch.no_grad()
def test_packed_samples_see_their_own_images(dhr: Tiny) -> None:
    """Three samples in one row give what each gives alone: nothing of one reaches another."""
    alone = [dhr.kwargs(prompt) for prompt in PROMPTS]
    packed = {
        "input_ids": torch.cat([kwargs["input_ids"] for kwargs in alone], 1),
        "sample_ids": torch.cat([torch.full_like(kwargs["input_ids"], i) for i, kwargs in enumerate(alone)], 1),
        "pixel_values": torch.cat([kwargs["pixel_values"] for kwargs in alone if "pixel_values" in kwargs]),
        "tile_grids": torch.cat([kwargs["tile_grids"] for kwargs in alone if "tile_grids" in kwargs]),
    }
    logits = dhr.model(**packed, use_cache=False).logits[0]
    expected = torch.cat([dhr.model(**kwargs, use_cache=False).logits[0] for kwargs in alone])
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("tiles", ["context", "memory"])
def test_allocation(tiles: str, tmp_path: Path) -> None:
    """Tiles in the sequence alone, and in the memory alone: what enters where, and batches and beams as rows alone."""
    tiny = Tiny(tmp_path, f"mixin:every=2,tiles={tiles}", "rope-dhr")
    kwargs = tiny.kwargs(MIXED)
    per_tile = 9
    in_sequence = int((kwargs["input_ids"] == tiny.model.config.image_token_id).sum())
    assert in_sequence == (8 if tiles == "context" else 2) * per_tile
    with torch.no_grad():
        cache = tiny.model(**kwargs, use_cache=True).past_key_values
    assert cache.layers[-1].mask.shape == (1, (2 if tiles == "context" else 8) * per_tile)
    expected = [tiny.generate(prompt)[0] for prompt in PROMPTS]
    assert tiny.generate(*PROMPTS) == expected
    beams = [tiny.generate(prompt, num_beams=2)[0] for prompt in PROMPTS]
    assert tiny.generate(*PROMPTS, num_beams=2) == beams
    if tiles == "context":  # the memory alone is filled with the prompt
        assert tiny.generate(*PROMPTS, use_cache=False) == expected


def test_tiles_in_the_memory_alone_turn_with_the_patches_they_cover(tmp_path: Path) -> None:
    """With one tile an image nothing is allocated: the memory holds what the sequence holds, at its positions."""
    alone = Tiny(tmp_path / "alone", "mixin:every=2,tiles=memory", "rope-dhr")
    both = Tiny(tmp_path / "both", "mixin:every=2", "rope-dhr")
    prompt = Prompt("One.", (image(42, 42),))
    with torch.no_grad():
        logits, expected = (tiny.model(**tiny.kwargs(prompt)).logits for tiny in (alone, both))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    # tiles that are not in the sequence have no positions there to choose from
    assert alone.generate(TILED) == alone.generate(TILED, positions="plain")
    kwargs = alone.kwargs(TILED)
    first = int((kwargs["input_ids"] == alone.model.config.image_token_id).nonzero()[0, 1])
    with torch.no_grad():
        embeds = alone.model.get_image_features(kwargs["pixel_values"], return_dict=True).pooler_output.flatten(0, 1)
        cache = alone.model(**kwargs, use_cache=True).past_key_values
        graft = alone.model.model.language_model.layers[1].mixin
        ids = torch.cat((tile_position_ids(1, 2, 3).flatten(), torch.arange(9))) + first
        keys, _ = graft.project(embeds[None], graft.rope(ids[None, None]))
    torch.testing.assert_close(cache.layers[-1].entries["1.mixin"][0], keys, atol=1e-5, rtol=0)


def test_every_parameter_moves(tmp_path: Path) -> None:
    """The gates at the first step, everything at the second."""
    source = tiny_checkpoint(tmp_path / "source", "internvl")
    apply(source, tmp_path / "patched", "mixin:every=2", "rope-dhr")
    model = models.load(tmp_path / "patched").train()
    kwargs = Inputs.from_directory(tmp_path / "patched").prepare([MIXED]).model_kwargs()
    own = {name: p for name, p in model.named_parameters() if ".mixin." in name}
    optimizer = torch.optim.SGD(own.values(), lr=0.5)
    for gates_alone in (True, False):
        model(**kwargs, labels=kwargs["input_ids"]).loss.backward()
        moved = {name for name, p in own.items() if p.grad is not None and bool(p.grad.any())}
        assert moved == {name for name in own if not gates_alone or name.endswith("_gate")}
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile_grids": None}, "pass tile_grids"),
        ({"tile_grids": torch.tensor([[1, 1], [4, 2]])}, "grid and tiles do not match"),
        ({"positions": "other"}, "choose 'dhr' or 'plain'"),
    ],
)
def test_what_is_refused(dhr: Tiny, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dhr.model(**dhr.kwargs(MIXED) | change)


def test_a_patched_checkpoint_without_new_parameters(tmp_path: Path) -> None:
    """RoPE-DHR alone adds none: no file of new tensors, and saving and loading keep the positions."""
    source = tiny_checkpoint(tmp_path / "source", "internvl")
    apply(source, tmp_path / "patched", "rope-dhr:tile_order=column,max_tiles=4")
    assert [path.name for path in (tmp_path / "patched").glob("*.safetensors")] == ["model-base.safetensors"]
    model = models.load(tmp_path / "patched")
    model.save_pretrained(tmp_path / "again")
    assert models.load(tmp_path / "again").config.surgeon["positions"] == {"scheme": "rope_dhr", "tile_order": "column"}
    inputs = Inputs.from_directory(tmp_path / "patched")
    assert inputs.image_processor.max_patches == 4
    grids = inputs.prepare([Prompt("Wide.", (image(300, 42),))]).grids
    assert grids == [[(1, 1, 4)]]


@pytest.mark.parametrize(
    "passes", [("mixin:every=2",), ("rope-dhr:tile_order=row", "mixin:every=2", "pvm:layers=1,latent=32")]
)
def test_a_family_with_the_thumbnail_first_and_separators(passes: Sequence[str], tmp_path: Path) -> None:
    """Ovis2: nothing in RoPE-DHR is written for one family."""
    source = tiny_checkpoint(tmp_path / "source", "ovis2")
    apply(source, tmp_path / "patched", *passes)
    plain, patched = models.load(source), models.load(tmp_path / "patched")
    before, after = (Inputs.from_directory(tmp_path / name) for name in ("source", "patched"))
    offered = any(each.startswith("rope-dhr") for each in passes)
    with torch.no_grad():
        same = plain(**before.prepare(PROMPTS).model_kwargs()).logits
        kwargs = after.prepare(PROMPTS, positions="plain" if offered else None).model_kwargs()
        assert torch.equal(patched(**kwargs).logits, same)


def test_ovis2_generation_continues_from_the_last_id(tmp_path: Path) -> None:
    tiny = Tiny(tmp_path, "mixin:every=2", "rope-dhr", model_type="ovis2")
    expected = [tiny.recomputed(prompt) for prompt in PROMPTS]
    assert tiny.generate(*PROMPTS) == expected
    kwargs = tiny.kwargs(MIXED)
    with torch.no_grad():
        dhr, plain = (tiny.model(**tiny.kwargs(MIXED, positions=choice)).logits for choice in ("dhr", "plain"))
    assert not torch.allclose(dhr, plain, atol=0.1)
    visual = kwargs["input_ids"] == tiny.model.config.image_token_id
    ids = position_ids(visual, None, kwargs["tile_grids"], 3, "first")
    tiles = int((kwargs["tile_grids"].prod(1) > 1).sum())
    assert int(ids.max()) + 1 == int((~visual).sum()) + 9 * len(kwargs["tile_grids"]) and tiles == 1
