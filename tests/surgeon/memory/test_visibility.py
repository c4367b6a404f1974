"""Who sees an image in the memory: with `causal` a cache, a prefix and one pass agree; `all` is as published."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from checkpoints import QWEN_TYPES, tiny_checkpoint, tiny_model
from patching import apply, batch, image, randomise_grafts
from surgeon import models
from surgeon.memory.slots import Slots
from surgeon.memory.visibility import visibility_of
from surgeon.pipeline import PreconditionError

FIRST, SECOND = (1, 4, 6), (1, 8, 4)
PASSES = {"pvm": ("pvm:layers=1,3,latent=32",), "both": ("mixin:every=2", "pvm:layers=1,latent=32")}
Make = Callable[..., PreTrainedModel]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A tiny model with open gates, grafted as asked for; each is made once."""
    grafted: dict[Any, PreTrainedModel] = {}

    def model(model_type: str, passes: str = "pvm", visibility: str = "causal") -> PreTrainedModel:
        key = (model_type, passes, visibility)
        if key not in grafted:
            directory = tmp_path_factory.mktemp("model")
            first, *others = PASSES[passes]
            tiny_model(model_type).save_pretrained(directory / "a")
            apply(directory / "a", directory / "b", f"{first},visibility={visibility}", *others)
            # where transformers' norms compute in fp32 alone: what is left of its rounding does not hide a difference
            grafted[key] = models.load(directory / "b").double()
            randomise_grafts(grafted[key])
        return grafted[key]

    return model


def conversation(model: PreTrainedModel, row: list[int]) -> dict[str, Tensor]:
    """A conversation with an image in each of two turns, with the positions of the whole."""
    kwargs = batch(model, [row], [FIRST, SECOND])
    kwargs["position_ids"] = model._prepare_position_ids_for_generation(kwargs["input_ids"], dict(kwargs))
    return kwargs


def part(kwargs: dict[str, Tensor], begin: int, end: int, patches: slice, grids: slice) -> dict[str, Tensor]:
    """Some columns of a conversation, with the images among them."""
    tokens = {name: kwargs[name][..., begin:end] for name in ("input_ids", "mm_token_type_ids", "position_ids")}
    if grids.start == grids.stop:
        return tokens
    return {
        **tokens,
        "pixel_values": kwargs["pixel_values"][patches],
        "image_grid_thw": kwargs["image_grid_thw"][grids],
    }


TURN = [5, 6, *image(FIRST), 7, 8]
ROW = [*TURN, 9, 10, *image(SECOND), 11]


def difference_between_turns_and_one_pass(model: PreTrainedModel) -> float:
    kwargs = conversation(model, ROW)
    with torch.no_grad():
        whole = model(**kwargs, use_cache=False).logits
        one = model(**part(kwargs, 0, len(TURN), slice(0, 24), slice(0, 1)), use_cache=True)
        later = part(kwargs, len(TURN), len(ROW), slice(24, None), slice(1, 2))
        two = model(**later, past_key_values=one.past_key_values, use_cache=True)
    return float((torch.cat((one.logits, two.logits), 1) - whole).abs().max())


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("model_type", QWEN_TYPES)
def test_turns_with_a_cache_equal_one_pass(make: Make, model_type: str, passes: str) -> None:
    assert difference_between_turns_and_one_pass(make(model_type, passes)) < 1e-6


def test_as_published_a_later_image_is_seen_by_what_stands_before_it(make: Make) -> None:
    """So turns and one pass differ: what `causal` is for."""
    assert difference_between_turns_and_one_pass(make("qwen3_vl", visibility="all")) > 1e-2


@pytest.mark.parametrize("visibility", ["causal", "all"])
def test_what_follows_changes_nothing_that_came_before(make: Make, visibility: str) -> None:
    """The prefix property: what a shared prefix computes is the same whatever is asked behind it."""
    model = make("qwen3_vl", "both", visibility)
    kwargs = conversation(model, ROW)
    with torch.no_grad():
        whole = model(**kwargs, use_cache=False).logits
        for end, patches, grids in ((2, 0, 0), (len(TURN), 24, 1), (len(TURN) + 2, 24, 1)):
            alone = model(**part(kwargs, 0, end, slice(0, patches), slice(0, grids)), use_cache=False).logits
            equal = torch.allclose(alone, whole[:, :end], atol=1e-6)
            assert equal == (visibility == "causal"), end


def test_an_image_split_over_two_calls_is_seen_as_far_as_it_came(make: Make) -> None:
    """Tokens of an image read it only where text does; what stands behind its first half sees the first half."""
    model = make("qwen3_vl", "both")
    decoder, width = model.model.language_model, model.config.text_config.hidden_size
    embeds = torch.randn(1, 9, width, generator=torch.Generator().manual_seed(0))
    visual = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 0, 0]], dtype=torch.bool)
    with torch.no_grad():
        call = {"has_images": True, "use_cache": True}
        whole = decoder(inputs_embeds=embeds, visual_token_mask=visual, **call).last_hidden_state
        for cut in range(1, 9):
            one = decoder(inputs_embeds=embeds[:, :cut], visual_token_mask=visual[:, :cut], **call)
            two = decoder(
                inputs_embeds=embeds[:, cut:],
                visual_token_mask=visual[:, cut:],
                past_key_values=one.past_key_values,
                **call,
            )
            together = torch.cat((one.last_hidden_state, two.last_hidden_state), 1)
            torch.testing.assert_close(together, whole, atol=1e-5, rtol=1e-5)


def test_packed_samples_see_their_own_images_behind_them(make: Make) -> None:
    model = make("qwen3_vl", "both")
    decoder, width = model.model.language_model, model.config.text_config.hidden_size
    embeds = torch.randn(1, 8, width, generator=torch.Generator().manual_seed(0))
    visual = torch.tensor([[0, 1, 1, 0, 0, 0, 1, 0]], dtype=torch.bool)
    samples = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    positions = torch.arange(4).repeat(2)[None]
    with torch.no_grad():
        call = {"has_images": True, "use_cache": False}
        packed = decoder(
            inputs_embeds=embeds, visual_token_mask=visual, sample_ids=samples, position_ids=positions, **call
        ).last_hidden_state
        for own in (slice(0, 4), slice(4, 8)):
            alone = decoder(
                inputs_embeds=embeds[:, own], visual_token_mask=visual[:, own], position_ids=positions[:, own], **call
            ).last_hidden_state
            torch.testing.assert_close(packed[:, own], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["sample_ids and a mask", "position_ids", "position_ids of four axes"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_packed_samples_see_their_own_however_it_is_said(make: Make, form: str, use_cache: bool) -> None:
    """A mask that hides padding alone does not join the samples, nor are they joined where positions part them."""
    model = make("qwen3_vl", "both")
    decoder, width = model.model.language_model, model.config.text_config.hidden_size
    embeds = torch.randn(2, 9, width, generator=torch.Generator().manual_seed(0))
    visual = torch.tensor([[0, 1, 1, 0, 0, 0, 1, 0, 0]], dtype=torch.bool).repeat(2, 1)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packing = {
        "sample_ids and a mask": {
            "sample_ids": torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]]).repeat(2, 1),
            "attention_mask": torch.tensor([[1] * 9, [1] * 8 + [0]]),
            "position_ids": positions,
        },
        "position_ids": {"position_ids": positions},
        "position_ids of four axes": {"position_ids": positions.expand(4, 2, -1)},
    }[form]
    call = {"has_images": True, "use_cache": use_cache}
    with torch.no_grad():
        packed = decoder(inputs_embeds=embeds, visual_token_mask=visual, **packing, **call).last_hidden_state
        for own in (slice(0, 4), slice(4, 8)):
            alone = decoder(inputs_embeds=embeds[:, own], visual_token_mask=visual[:, own], **call).last_hidden_state
            torch.testing.assert_close(packed[:, own], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_samples_cannot_be_packed_behind_a_cache(make: Make) -> None:
    model = make("qwen3_vl", "both")
    ids = torch.tensor([[5, 6, 7]])
    cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="pass no past_key_values"):
        model(input_ids=ids, sample_ids=torch.tensor([[0, 1, 1]]), past_key_values=cache)


@given(st.data())
def test_which_slots_a_token_sees(data: st.DataObject) -> None:
    """Against one comparison at a time."""
    rows, slots, tokens = (data.draw(st.integers(1, n)) for n in (3, 5, 4))

    def integers(*shape: int, top: int = 6) -> Tensor:
        count = torch.Size(shape).numel()
        return torch.tensor(data.draw(st.lists(st.integers(0, top), min_size=count, max_size=count))).view(shape)

    mask, places = integers(rows, slots, top=1).bool(), integers(rows, slots)
    token_places = integers(tokens)
    packed = data.draw(st.booleans())
    slot_samples, token_samples = (integers(rows, n, top=1) if packed else None for n in (slots, tokens))
    seen = Slots(mask, places, slot_samples).seen_by(token_places, token_samples)
    for row in range(rows):
        for token in range(tokens):
            for slot in range(slots):
                own = not packed or slot_samples[row, slot] == token_samples[row, token]  # type: ignore[index]
                behind = places[row, slot] <= token_places[token]
                assert bool(seen[row, token, slot]) == bool(mask[row, slot] and own and behind)


def test_it_is_recorded_and_one_for_all_grafts_of_a_model(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl")
    apply(source, tmp_path / "fresh", "pvm:layers=1,latent=32")
    assert visibility_of(models.load(tmp_path / "fresh").config.surgeon) == "causal"
    apply(source, tmp_path / "published", "pvm:layers=1,latent=32,visibility=all")
    apply(tmp_path / "published", tmp_path / "both", "mixin:every=2")  # takes what the other graft has
    assert [entry["visibility"] for entry in models.load(tmp_path / "both").config.surgeon["grafts"]] == ["all"] * 2
    with pytest.raises(PreconditionError, match="visibility=causal, but the pvm grafts .* visibility=all"):
        apply(tmp_path / "published", tmp_path / "mixed", "mixin:every=2,visibility=causal")


def test_a_record_without_it_is_from_before_the_choice() -> None:
    assert visibility_of({"grafts": [{"kind": "pvm", "layers": [1]}]}) == "all"


def test_embeddings_that_pass_the_base_model_by_are_refused(make: Make) -> None:
    """A library that replaces the base model's forward would leave the memory empty, and say nothing."""
    decoder = make("qwen3_vl").model.language_model
    with pytest.raises(ValueError, match="past the patched base model"):
        decoder(inputs_embeds=torch.zeros(1, 2, decoder.config.hidden_size))
    assert decoder(input_ids=torch.tensor([[5, 6]])).last_hidden_state.shape[1] == 2  # text alone


def test_a_graft_beside_one_that_was_recorded_without_it_sees_all(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl")
    apply(source, tmp_path / "old", "pvm:layers=1,latent=32,visibility=all")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    del config["surgeon"]["grafts"][0]["visibility"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    apply(tmp_path / "old", tmp_path / "both", "mixin:every=2")
    assert visibility_of(models.load(tmp_path / "both").config.surgeon) == "all"
