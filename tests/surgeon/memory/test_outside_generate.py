"""What a caller may do beside `generate`: with its cache between calls, with other attention kernels, with tiles.

The reference is a request alone, or the model without a cache.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_flash_attention_utils import _is_packed_sequence
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from checkpoints import has_tokenizer, tiny_checkpoint
from patching import apply, randomise_grafts
from surgeon import models
from surgeon.inputs import Inputs, Prompt, Side
from surgeon.memory.rope_dhr import position_ids

pytestmark = pytest.mark.skipif(not has_tokenizer(), reason="the demo checkpoint is not there")

NEXT_TOKENS = torch.tensor([[11], [12], [13]])


def image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


TILED = Prompt("What is it?", (image(90, 42),))
WORDS = Prompt("hello there")
MIXED = Prompt("Compare them.", (image(42, 42, 1), image(90, 130, 2)))
PROMPTS = (TILED, WORDS, MIXED)
"""Images of 1 x 2 tiles; none; of one tile, and of 3 x 2."""


def patched_tiny(directory: Path, *passes: str, model_type: str = "internvl") -> tuple[PreTrainedModel, Inputs]:
    """A tiny patched model with grafts as if trained, and what prepares its inputs."""
    apply(tiny_checkpoint(directory / "source", model_type), directory / "patched", *passes)
    model = models.load(directory / "patched")
    randomise_grafts(model)
    return model, Inputs.from_directory(directory / "patched")


@pytest.fixture(scope="module")
def dhr(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Inputs]:
    return patched_tiny(tmp_path_factory.mktemp("dhr"), "mixin:every=2", "rope-dhr")


def next_logits_alone(model: PreTrainedModel, inputs: Inputs, row: int) -> Tensor:
    """The logits [V] of one prompt's own next token, in a request of its own."""
    prefill = model(**inputs.prepare([PROMPTS[row]]).model_kwargs(), use_cache=True)
    return model(input_ids=NEXT_TOKENS[row][None], past_key_values=prefill.past_key_values).logits[0, -1]


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: None, [0, 1, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ],
    ids=["as it is", "selected", "reordered", "repeated"],
)
@torch.no_grad()
def test_rows_of_a_cache_go_on_as_each_alone(
    dhr: tuple[PreTrainedModel, Inputs], change: Any, rows: list[int], padding_side: Side
) -> None:
    """Steps that give no positions continue each row's own, padded on either side."""
    model, inputs = dhr
    kwargs = inputs.prepare(PROMPTS, padding_side=padding_side).model_kwargs()
    cache = model(**kwargs, use_cache=True).past_key_values
    change(cache)
    mask = torch.nn.functional.pad(kwargs["attention_mask"][rows], (0, 1), value=1)
    logits = model(input_ids=NEXT_TOKENS[rows], attention_mask=mask, past_key_values=cache).logits[:, -1]
    expected = torch.stack([next_logits_alone(model, inputs, row) for row in rows])
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)


@torch.no_grad()
def test_a_cache_that_was_reset_is_a_new_one(dhr: tuple[PreTrainedModel, Inputs]) -> None:
    """No image and no position of the batch before it is left, for as many rows or for fewer."""
    model, inputs = dhr
    for prompts in (PROMPTS[::-1], (WORDS,), (MIXED,)):
        cache = model(**inputs.prepare(PROMPTS).model_kwargs(), use_cache=True).past_key_values
        cache.reset()
        kwargs = inputs.prepare(prompts, positions="plain").model_kwargs()
        again = model(**kwargs, past_key_values=cache, use_cache=True)
        new = model(**kwargs, use_cache=True)
        assert torch.equal(again.logits, new.logits)
        step = {"input_ids": NEXT_TOKENS[: len(prompts)]}
        step["attention_mask"] = torch.nn.functional.pad(kwargs["attention_mask"], (0, 1), value=1)
        after = [model(**step, past_key_values=each.past_key_values).logits for each in (again, new)]
        assert torch.equal(*after)


def attend_as_flash_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention as transformers' flash attention calls its kernel: a row whose position ids do not rise by one is cut
    into samples, where the lowest id stands again. query [B, H, S, hd], keys and values [B, Hkv, T, hd]."""
    length, past = query.shape[2], key.shape[2] - query.shape[2]
    sample = torch.zeros(length, dtype=torch.int64)
    ids = kwargs.get("position_ids")
    if _is_packed_sequence(ids, len(query)):
        sample = (ids[0] == ids.min()).cumsum(0)
    before = torch.ones(length, past + length, dtype=torch.bool).tril(past)
    before[:, past:] &= sample[:, None] == sample
    attended = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, before, scale=kwargs["scaling"], enable_gqa=True
    )
    return attended.transpose(1, 2).contiguous(), None


@pytest.fixture
def as_flash(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "as_flash", attend_as_flash_attention)
    return {"text_config": "as_flash"}


@torch.no_grad()
def test_flash_attention_does_not_take_tiles_for_packed_samples(as_flash: dict[str, str], tmp_path: Path) -> None:
    """A prompt that begins with its tiles has its lowest id more than once."""
    model, inputs = patched_tiny(tmp_path, "mixin:every=2", "rope-dhr")
    kwargs = inputs.prepare([TILED]).model_kwargs()
    first = int((kwargs["input_ids"] == model.config.image_token_id).nonzero()[0, 1])
    kwargs |= {name: kwargs[name][:, first:] for name in ("input_ids", "attention_mask")}
    expected = model(**kwargs).logits
    model.set_attn_implementation(as_flash)
    torch.testing.assert_close(model(**kwargs).logits, expected, atol=2e-5, rtol=0)


@torch.no_grad()
def test_flash_attention_tells_packed_samples_apart_by_their_positions(
    as_flash: dict[str, str], tmp_path: Path
) -> None:
    """Without RoPE-DHR position ids go to the attention, as in the plain model."""
    model, _ = patched_tiny(tmp_path, "mixin:every=2")
    ids, packed_positions = torch.arange(5, 15)[None], torch.tensor([[*range(4), *range(6)]])
    alone = model(input_ids=ids[:, 4:]).logits
    model.set_attn_implementation(as_flash)
    packed = model(input_ids=ids, position_ids=packed_positions).logits
    torch.testing.assert_close(packed[:, 4:], alone, atol=2e-5, rtol=0)


@torch.no_grad()
def test_a_later_turn_whose_thumbnails_alone_enter(tmp_path: Path) -> None:
    """tiles=context: of an image in a later turn, the thumbnail's tokens and no others enter the memory."""
    model, inputs = patched_tiny(tmp_path, "mixin:every=2,tiles=context", "rope-dhr")
    conversation = [*WORDS.messages(), {"role": "assistant", "content": "Yes."}, *TILED.messages()]
    whole = inputs.prepare([conversation]).model_kwargs()
    first = inputs.prepare([WORDS]).model_kwargs()
    length = first["input_ids"].shape[1]
    assert torch.equal(whole["input_ids"][:, :length], first["input_ids"])
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cache = model(**first, use_cache=True).past_key_values
    later = model.generate(**whole, past_key_values=cache, **options)

    # by hand: the second turn's tokens behind the first's, at their positions in the conversation
    ids = whole["input_ids"]
    visual = ids == model.config.image_token_id
    positions = position_ids(visual, None, whole["tile_grids"], 3, "last")[:, length:]
    run = {"input_ids": ids[:, length:], "position_ids": positions, "pixel_values": whole["pixel_values"]}
    cache = model(**first, use_cache=True).past_key_values
    for step in later.logits:
        logits = model(**run, tile_grids=whole["tile_grids"], past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(step, logits, atol=2e-5, rtol=0)
        positions = positions[:, -1:] + 1
        run = {"input_ids": logits.argmax(-1)[:, None], "position_ids": positions}


@pytest.mark.parametrize("model_type", ["internvl", "ovis2"])
@torch.no_grad()
def test_tiles_in_the_memory_alone_leave_the_thumbnail_in_the_sequence(model_type: str, tmp_path: Path) -> None:
    """InternVL's thumbnail comes last, Ovis2's first: with closed gates the model is its source over thumbnails."""
    source = tiny_checkpoint(tmp_path / "source", model_type)
    apply(source, tmp_path / "patched", "mixin:every=2,tiles=memory")
    plain, patched = models.load(source), models.load(tmp_path / "patched")
    prepared = Inputs.from_directory(tmp_path / "patched").prepare(PROMPTS)
    kwargs = prepared.model_kwargs()
    thumbnail = -1 if model_type == "internvl" else 0
    thumbnails = [torch.from_numpy(tiles[thumbnail]) for row in prepared.pixel_values for tiles in row]
    alone = {name: kwargs[name] for name in ("input_ids", "attention_mask")}
    expected = plain(**alone, pixel_values=torch.stack(thumbnails)).logits
    assert torch.equal(patched(**kwargs).logits, expected)
    # and tiles are what the memory adds: each image's change its own row, and no row without images
    randomise_grafts(patched)
    changed = (patched(**kwargs).logits - expected).abs().amax((1, 2))
    assert changed[0] > 0.1 and changed[1] == 0 and changed[2] > 0.1


@torch.no_grad()
def test_dynamic_ntk_counts_ids_not_tokens(tmp_path: Path) -> None:
    """A prompt of more tokens than the pretraining's positions, and fewer ids, keeps the pretraining's frequencies."""
    logits = []
    for rope_type in ("dynamic", "default"):
        rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 8.0}
        source = tiny_checkpoint(
            tmp_path / rope_type / "source",
            "internvl",
            text_type="llama",
            rope_parameters=rope,
            max_position_embeddings=64,
        )
        apply(source, tmp_path / rope_type / "patched", "rope-dhr")
        model = models.load(tmp_path / rope_type / "patched")
        inputs = Inputs.from_directory(tmp_path / rope_type / "patched")
        kwargs = inputs.prepare([MIXED]).model_kwargs()
        ids = position_ids(
            kwargs["input_ids"] == model.config.image_token_id, None, kwargs["tile_grids"], side=3, thumbnail="last"
        )
        assert ids.max() < 64 < kwargs["input_ids"].shape[1]
        logits.append([model(**{**kwargs, "positions": positions}).logits for positions in ("dhr", "plain")])
    (dynamic, dynamic_plain), (default, default_plain) = logits
    assert torch.equal(dynamic, default)
    assert (dynamic_plain - default_plain).abs().max() > 0.01
