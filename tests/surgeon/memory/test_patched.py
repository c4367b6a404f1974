"""The patched model in transformers: identity at insertion, and every way in which `generate` is used."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from checkpoints import QWEN_TYPES
from patching import LAYERS, batch, image, open_gates, patched_pair
from surgeon.memory.visual_memory import VisualMemory

SMALL, WIDE, TALL = (1, 4, 6), (1, 4, 10), (1, 8, 4)
PAIR = tuple[PreTrainedModel, PreTrainedModel]


@pytest.fixture(scope="module", params=QWEN_TYPES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PAIR:
    """Source and patched, gates open: nothing below may depend on them being closed."""
    source, patched = patched_pair(tmp_path_factory.mktemp(request.param), request.param)
    open_gates(patched)
    return source, patched


@pytest.fixture
def patched(pair: PAIR) -> PreTrainedModel:
    return pair[1]


def rows() -> tuple[list[list[int]], list[tuple[int, int, int]]]:
    """Three rows: two images, none, one as the very first and last thing."""
    return [
        [5, 6, *image(SMALL), 7, *image(WIDE), 8, 9],
        [10, 11, 12, 13],
        [*image(TALL)],
    ], [SMALL, WIDE, TALL]


def greedy(model: PreTrainedModel, kwargs: dict[str, torch.Tensor], n: int = 12, **options: object) -> torch.Tensor:
    with torch.no_grad():
        tokens = model.generate(**kwargs, max_new_tokens=n, do_sample=False, **options)
    return tokens[:, kwargs["input_ids"].shape[1] :]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", QWEN_TYPES)
def test_identity_at_insertion(model_type: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source, patched = patched_pair(tmp_path, model_type, dtype)
    assert patched.dtype == dtype
    kwargs = batch(source, *rows())
    with torch.no_grad():
        assert torch.equal(source(**kwargs).logits, patched(**kwargs).logits)
    assert torch.equal(greedy(source, kwargs), greedy(patched, kwargs))
    before = {name: p.clone() for name, p in source.named_parameters()}
    assert all(torch.equal(patched.get_parameter(name), p) for name, p in before.items())


def test_open_gates_change_the_answer(pair: PAIR) -> None:
    source, patched = pair
    kwargs = batch(source, *rows())
    with torch.no_grad():
        difference = (source(**kwargs).logits - patched(**kwargs).logits).abs().amax((1, 2))
    assert difference[0] > 0.1 and difference[2] > 0.1
    assert difference[1] == 0  # a row without images, beside rows with some


def test_text_only_is_the_source(pair: PAIR) -> None:
    source, patched = pair
    kwargs = batch(source, [[5, 6, 7, 8], [9, 10]], [])
    with torch.no_grad():
        assert torch.equal(source(**kwargs).logits, patched(**kwargs).logits)
    assert torch.equal(greedy(source, kwargs), greedy(patched, kwargs))


def test_cache_holds_what_recomputing_gives(patched: PreTrainedModel) -> None:
    kwargs = batch(patched, [rows()[0][0]], [SMALL, WIDE])
    generated = greedy(patched, kwargs)
    for _ in range(generated.shape[1]):
        with torch.no_grad():
            logits = patched(**kwargs, use_cache=False).logits[:, -1]
        ids = torch.cat((kwargs["input_ids"], logits.argmax(-1)[:, None]), 1)
        kwargs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        kwargs["mm_token_type_ids"] = (ids == patched.config.image_token_id).long()
    assert torch.equal(kwargs["input_ids"][:, -generated.shape[1] :], generated)


def test_rows_of_a_batch_equal_each_alone(patched: PreTrainedModel) -> None:
    ids, grids = rows()
    kwargs = batch(patched, ids, grids)
    together = greedy(patched, kwargs)
    pixels = kwargs["pixel_values"].split([t * h * w for t, h, w in grids])
    alone_pixels = [torch.cat(pixels[:2]), None, pixels[2]]
    with torch.no_grad():
        logits = patched(**kwargs).logits
        for row, (tokens, own) in enumerate(zip(ids, alone_pixels, strict=True)):
            alone = batch(patched, [tokens], [grids[:2], [], grids[2:]][row])
            if own is not None:
                alone["pixel_values"] = own
            torch.testing.assert_close(logits[row, -len(tokens) :], patched(**alone).logits[0], atol=1e-5, rtol=1e-5)
            assert greedy(patched, alone)[0].tolist() == together[row].tolist()


def test_memory_is_computed_once_per_image(patched: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = patched.model.language_model.layers
    calls: list[int] = []
    for index in LAYERS:
        project = layers[index].pvm.project
        monkeypatch.setattr(layers[index].pvm, "project", lambda v, r, p=project: calls.append(v.shape[1]) or p(v, r))
    greedy(patched, batch(patched, *rows()), n=8)
    assert calls == [16, 16]  # once per layer, for the 6 + 10 visual tokens of the longest row


def test_sampling_beams_and_returned_sequences(patched: PreTrainedModel) -> None:
    kwargs = batch(patched, *rows())
    with torch.no_grad():
        torch.manual_seed(0)
        sampled = patched.generate(**kwargs, max_new_tokens=6, do_sample=True, num_return_sequences=2)
        assert sampled.shape[0] == 6
        beams = patched.generate(**kwargs, max_new_tokens=6, do_sample=False, num_beams=3)
        for row in range(3):  # a batch of beams equals each row's beams alone: memory rows follow their beams
            ids, grids = rows()
            alone = batch(patched, [ids[row]], [grids[:2], [], grids[2:]][row])
            if row != 1:
                pixels = kwargs["pixel_values"].split([t * h * w for t, h, w in grids])
                alone["pixel_values"] = torch.cat(pixels[:2]) if row == 0 else pixels[2]
            own = patched.generate(**alone, max_new_tokens=6, do_sample=False, num_beams=3)
            assert own[0, -6:].tolist() == beams[row, -6:].tolist()


def test_memory_rows_follow_the_cache(patched: PreTrainedModel) -> None:
    kwargs = batch(patched, *rows())
    with torch.no_grad():
        cache = patched(**kwargs, use_cache=True).past_key_values
    memory = VisualMemory.of(cache, 4)
    keys, mask = memory.entries["1.pvm"][0], memory.mask
    assert mask is not None and mask.sum(1).tolist() == [16, 0, 8]
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(memory.entries["1.pvm"][0], keys[[2, 0, 0]])
    assert memory.mask is not None and torch.equal(memory.mask, mask[[2, 0, 0]])
    cache.batch_repeat_interleave(2)
    assert torch.equal(memory.mask, mask[[2, 2, 0, 0, 0, 0]])
    cache.batch_select_indices(torch.tensor([5]))
    assert torch.equal(memory.entries["3.pvm"][1].shape[0] * torch.ones(1), torch.ones(1))


def test_interleaved_requests_do_not_meet(patched: PreTrainedModel) -> None:
    first = batch(patched, [[5, *image(SMALL), 7]], [SMALL], seed=1)
    second = batch(patched, [[5, *image(WIDE), 7]], [WIDE], seed=2)
    with torch.no_grad():
        expected = patched(**first, use_cache=True)
        step = {"input_ids": torch.tensor([[9]])}
        positions = torch.full((4, 1, 1), 12)
        alone = patched(**step, position_ids=positions, past_key_values=copy.deepcopy(expected.past_key_values)).logits
        patched(**second, use_cache=True)
        after = patched(**step, position_ids=positions, past_key_values=expected.past_key_values).logits
    assert torch.equal(alone, after)


@pytest.mark.parametrize("second_image", [True, False])
def test_later_turn_with_the_same_cache(pair: PAIR, second_image: bool) -> None:
    source, patched = pair
    first = [5, 6, *image(SMALL), 7]
    both = batch(patched, [[*first, *image(WIDE)]], [SMALL, WIDE])["pixel_values"]

    def conversation(ids: list[int], grids: list[tuple[int, int, int]]) -> dict[str, torch.Tensor]:
        kwargs = batch(patched, [ids], grids)
        return {**kwargs, "pixel_values": both[: len(kwargs["pixel_values"])]}

    def two_turns(model: PreTrainedModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        with torch.no_grad():
            turn = model.generate(
                **conversation(first, [SMALL]), max_new_tokens=4, do_sample=False, return_dict_in_generate=True
            )
            ids = [*turn.sequences[0].tolist(), 8, *(image(WIDE) if second_image else []), 9]
            kwargs = conversation(ids, [SMALL, WIDE] if second_image else [SMALL])
            return greedy(model, kwargs, past_key_values=turn.past_key_values), kwargs

    # With the gates closed both ways through the conversation are the backbone's: they agree token for token.
    open_gates(patched, 0.0)
    tokens, kwargs = two_turns(patched)
    assert torch.equal(tokens, greedy(source, kwargs))
    # Open, the second turn reads both images. Turn one's tokens read the first only, which one pass cannot imitate:
    # compare with the forward called by hand, turn by turn.
    open_gates(patched, 0.8)
    tokens, kwargs = two_turns(patched)
    seen = len(first) + 3  # the last generated token is not in the cache yet
    positions = patched._prepare_position_ids_for_generation(kwargs["input_ids"], dict(kwargs))
    ids = kwargs["input_ids"]
    pixels = {"pixel_values": both[24:], "image_grid_thw": torch.tensor([WIDE])} if second_image else {}
    with torch.no_grad():
        one = patched(
            input_ids=ids[:, :seen],
            position_ids=positions[..., :seen],
            pixel_values=both[:24],
            image_grid_thw=torch.tensor([SMALL]),
            mm_token_type_ids=kwargs["mm_token_type_ids"][:, :seen],
            use_cache=True,
        )
        two = patched(
            input_ids=ids[:, seen:],
            position_ids=positions[..., seen:],
            past_key_values=one.past_key_values,
            mm_token_type_ids=kwargs["mm_token_type_ids"][:, seen:],
            **pixels,
        )
    memory = VisualMemory.of(two.past_key_values, 4)
    assert memory.mask is not None and memory.mask.shape[1] == (16 if second_image else 6)
    assert int(two.logits[0, -1].argmax()) == int(tokens[0, 0])


def test_a_later_turn_after_another_conversation(pair: PAIR) -> None:
    """transformers keeps the last conversation's position offset on the model; each must go on with its own."""
    source, patched = pair
    open_gates(patched, 0.0)
    first, other = batch(patched, [[5, *image(SMALL), 7]], [SMALL]), batch(patched, [[5, *image(WIDE), 7]], [WIDE])
    with torch.no_grad():
        turn = patched.generate(**first, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        greedy(patched, other)
        later = batch(patched, [[*turn.sequences[0].tolist(), 8, 9]], [SMALL])
        tokens = greedy(patched, later, past_key_values=turn.past_key_values)
    assert torch.equal(tokens, greedy(source, later))
    open_gates(patched)


def test_later_turn_without_the_earlier_images_is_refused(patched: PreTrainedModel) -> None:
    first = batch(patched, [[5, *image(SMALL), 7]], [SMALL])
    with torch.no_grad():
        cache = patched(**first, use_cache=True).past_key_values
        ids = [5, *image(SMALL), 7, *image(WIDE)]
        with pytest.raises(ValueError, match="2 images and 1 grids"):
            patched.generate(**batch(patched, [ids], [WIDE]), past_key_values=cache, max_new_tokens=2)


def test_embeddings_instead_of_ids(patched: PreTrainedModel) -> None:
    kwargs = batch(patched, *rows())
    with torch.no_grad():
        expected = patched(**kwargs, use_cache=False).logits
        positions, _ = patched.model.get_rope_index(
            kwargs["input_ids"],
            image_grid_thw=kwargs["image_grid_thw"],
            mm_token_type_ids=kwargs["mm_token_type_ids"],
            attention_mask=kwargs["attention_mask"],
        )
        embeds = patched.get_input_embeddings()(kwargs.pop("input_ids"))
        kwargs.pop("mm_token_type_ids")
        logits = patched(**kwargs, inputs_embeds=embeds, position_ids=positions, use_cache=False).logits
    valid = kwargs["attention_mask"].bool()
    torch.testing.assert_close(logits[valid], expected[valid], atol=1e-5, rtol=1e-5)
