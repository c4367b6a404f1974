"""Memory that a model calls for, in the model's own forward: every number against the plain model's.

Models are in fp64, so formers, which make differences large, make none of rounding.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from checkpoints import FAMILIES, has_tokenizer
from patching import randomise_grafts
from surgeon import models
from surgeon.inputs import Prompt
from surgeon.memory.invoked_memory import InvokedMemory
from surgeon.models import family
from vismem_models import (
    FORMERS,
    SEEING,
    TWO,
    VISMEM,
    WINDOW,
    WORDS,
    VisMemPair,
    decoded,
    extended,
    image,
    ordinary,
    plain_forward,
    positions_of,
    randomise_vismem,
    span,
    step_kwargs,
)

pytestmark = pytest.mark.skipif(not has_tokenizer(), reason="needs the demo checkpoint's tokenizer")
every_family = pytest.mark.parametrize("model_type", FAMILIES)
every_former = pytest.mark.parametrize("short_former", FORMERS)
Pairs = Callable[..., VisMemPair]
PROMPTS = (SEEING, WORDS, TWO)
ANSWER = 26


def assert_equal(tensor: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(tensor, expected, atol=1e-9, rtol=0)


def answers_of(pair: VisMemPair) -> list[list[int]]:
    """One for each of PROMPTS, of one length: rows that invoke at different steps, different kinds, several times, one
    right behind another, and never."""
    short, long = span(pair.tokens, "short"), span(pair.tokens, "long")
    answers = [
        [7, 8, *short, 9, 10, 11, *long, 12, *short, 13],
        [7] * ANSWER,
        [*long, *short, 20, 21, 22, *short],
    ]
    return [[*answer, *range(30, 30 + ANSWER - len(answer))] for answer in answers]


def latents_of(cache: Any, row: int) -> list[Tensor]:
    memory = InvokedMemory.of(cache)
    assert memory is not None
    return [invocation.latents for invocation in memory.invocations[row]]


# -- latents and their places ------------------------------------------------------------------------------------
@pytest.mark.parametrize("side", ["left", "right"])
@every_former
@every_family
def test_each_row_is_one_plain_forward_over_its_latents(
    vismem_pair: Pairs, model_type: str, short_former: str, side: Any
) -> None:
    """Decoded token by token in a batch, against the unpatched model over embeddings, one row at a time."""
    pair = vismem_pair(model_type, short_former)
    prompts, answers = pair.kwargs(*PROMPTS, side=side), answers_of(pair)
    length = prompts["input_ids"].shape[1]
    logits, cache = decoded(pair.model, extended(prompts, answers), length)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        latents = latents_of(cache, row)
        expected = plain_forward(pair, extended(pair.kwargs(prompt), [answer]), latents)
        present = torch.cat((prompts["attention_mask"][row].bool(), torch.ones(ANSWER, dtype=torch.bool)))
        assert_equal(ordinary(pair.tokens, logits[row, present]), ordinary(pair.tokens, expected.logits))
        if row != 1:
            other = plain_forward(pair, extended(pair.kwargs(prompt), [answer]), [-each for each in latents])
            assert (other.logits - expected.logits).abs().max() > 0.1
    memory = InvokedMemory.of(cache)
    assert memory is not None
    kinds = [[(each.kind, each.place - length) for each in own] for own in memory.invocations]
    assert kinds == [[("short", 2), ("long", 10), ("short", 18)], [], [("long", 0), ("short", 7), ("short", 15)]]


@every_former
@every_family
def test_a_row_of_a_batch_is_as_it_is_alone(vismem_pair: Pairs, model_type: str, short_former: str) -> None:
    """Latents and all: what a row's memory is formed of is its own."""
    pair = vismem_pair(model_type, short_former)
    answers = answers_of(pair)
    answers[1] = [7, *span(pair.tokens, "long"), *range(40, 40 + ANSWER - 8)]
    prompts = pair.kwargs(*PROMPTS)
    length = prompts["input_ids"].shape[1]
    logits, _ = decoded(pair.model, extended(prompts, answers), length)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        own = pair.kwargs(prompt)
        alone, _ = decoded(pair.model, extended(own, [answer]), own["input_ids"].shape[1])
        assert_equal(logits[row, -alone.shape[1] :], alone[0])


@pytest.mark.parametrize("use_cache", [False, True])
@every_former
@every_family
def test_one_forward_over_everything_is_decoding(
    vismem_pair: Pairs, model_type: str, short_former: str, use_cache: bool
) -> None:
    """Teacher forcing, as a trainer recomputes the logits of what was generated."""
    pair = vismem_pair(model_type, short_former)
    prompts = pair.kwargs(*PROMPTS)
    whole = extended(prompts, answers_of(pair))
    stepwise, cache = decoded(pair.model, whole, prompts["input_ids"].shape[1])
    with torch.no_grad():
        output = pair.model(**whole, position_ids=positions_of(pair.model, whole), use_cache=use_cache)
    present = whole["attention_mask"].bool()
    assert_equal(output.logits[present], stepwise[present])
    if use_cache:
        for row in range(len(PROMPTS)):
            assert_equal(
                torch.cat(latents_of(output.past_key_values, row) or [torch.zeros(0)]),
                torch.cat(latents_of(cache, row) or [torch.zeros(0)]),
            )


@pytest.mark.parametrize("bounds", [(3,), (2, 3, 5), (12, 13), (7, 19, 20, 25)])
@every_former
def test_an_answer_may_come_in_any_parts(vismem_pair: Pairs, short_former: str, bounds: Sequence[int]) -> None:
    """Parts that end in the middle of an invocation, at its invoke token and before its end token."""
    pair = vismem_pair("qwen3_vl", short_former)
    prompts = pair.kwargs(*PROMPTS)
    whole, length = extended(prompts, answers_of(pair)), prompts["input_ids"].shape[1]
    stepwise, _ = decoded(pair.model, whole, length)
    positions = positions_of(pair.model, whole)
    edges = [length + bound for bound in bounds] + [length + ANSWER]
    kwargs, cache, logits = {**whole, **step_kwargs(whole, positions, slice(0, length))}, None, []
    start = length
    with torch.no_grad():
        for edge in [*edges, None]:
            output = pair.model(**kwargs, past_key_values=cache, use_cache=True)
            logits.append(output.logits)
            cache = output.past_key_values
            if edge is not None:
                kwargs, start = step_kwargs(whole, positions, slice(start, edge)), edge
    assert_equal(torch.cat(logits, 1), stepwise)


# -- what memory is formed of ------------------------------------------------------------------------------------
def formed_of(model: Any, calls: list[tuple[Any, ...]]) -> Any:
    """A hook that keeps kind, hidden states of images and of text, and how many images, of each call of a former."""
    return model.base_model.vismem.register_forward_pre_hook(
        lambda module, args: calls.append((args[2], args[3], args[4], len(args[5])))
    )


@pytest.mark.parametrize("words", [0, WINDOW - 8, WINDOW + 20])
@every_family
def test_formers_are_given_the_last_hidden_states(vismem_pair: Pairs, model_type: str, words: int) -> None:
    """Of the images so far, and of what was said since the last invocation, its end token first, within the window."""
    pair = vismem_pair(model_type)
    tokens = pair.tokens
    prompt = pair.kwargs(SEEING)
    answer = [
        7,
        *span(tokens, "short"),
        *[11 + n % 50 for n in range(words)],
        8,
        *span(tokens, "long"),
        *span(tokens, "short"),
        9,
    ]
    whole, length = extended(prompt, [answer]), prompt["input_ids"].shape[1]
    calls: list[tuple[Any, ...]] = []
    hook = formed_of(pair.model, calls)
    _, cache = decoded(pair.model, whole, length)
    hook.remove()
    plain = plain_forward(pair, whole, latents_of(cache, 0))
    (ids,) = whole["input_ids"].tolist()
    invocations = [column for column, token in enumerate(ids) if token in tokens.invoke.values()]
    ends = [column for column, token in enumerate(ids) if token in tokens.end.values()]
    assert len(calls) == len(invocations) == 3
    for (kind, seen, said, images), place, since in zip(calls, invocations, [0, *ends], strict=False):
        assert kind == tokens.kind_of(ids[place]) and images == 1
        assert_equal(seen, plain.last_hidden_states[plain.is_visual])
        columns = [column for column in range(since, place + 1) if not plain.is_visual[column]]
        assert_equal(said, plain.last_hidden_states[columns[-WINDOW:]])


@torch.no_grad()
def test_a_right_padded_row_has_the_window_that_it_has_alone(vismem_pair: Pairs) -> None:
    """Padding between a prompt and its answer is nothing that was said."""
    pair = vismem_pair("qwen3_vl")
    longer = Prompt(" ".join(["word"] * 90))
    answer = [7, 8, *span(pair.tokens, "long"), 9]
    batch, own = pair.kwargs(WORDS, longer, side="right"), pair.kwargs(WORDS)
    logits, _ = decoded(pair.model, extended(batch, [answer, answer]), batch["input_ids"].shape[1])
    alone, _ = decoded(pair.model, extended(own, [answer]), own["input_ids"].shape[1])
    assert_equal(logits[0, -len(answer) :], alone[0, -len(answer) :])


# -- what it leaves alone ----------------------------------------------------------------------------------------
@every_former
@every_family
def test_just_inserted_it_changes_nothing(vismem_pair: Pairs, model_type: str, short_former: str) -> None:
    pair = vismem_pair(model_type, short_former)
    kwargs = pair.kwargs(*PROMPTS)
    with torch.no_grad():
        logits, expected = (ordinary(pair.tokens, model(**kwargs).logits) for model in (pair.fresh, pair.source))
    assert torch.equal(logits, expected)


@every_former
@every_family
def test_memory_of_one_request_changes_no_other(vismem_pair: Pairs, model_type: str, short_former: str) -> None:
    """Ordinary decoding between the steps of a request that calls for memory is the plain model's, bit for bit."""
    pair = vismem_pair(model_type, short_former)
    whole = extended(pair.kwargs(SEEING), [[7, *span(pair.tokens, "short"), *span(pair.tokens, "long")]])
    length = whole["input_ids"].shape[1] - 13
    words = extended(pair.kwargs(TWO), [list(range(50, 63))])
    words_length = words["input_ids"].shape[1] - 13
    expected, _ = decoded(pair.source, words, words_length)

    positions, own_positions = positions_of(pair.model, whole), positions_of(pair.model, words)
    caches: list[Any] = [None, None]
    logits = []
    with torch.no_grad():
        for step in range(14):
            for request, (kwargs, ids, first) in enumerate(
                ((whole, positions, length), (words, own_positions, words_length))
            ):
                columns = slice(0, first) if step == 0 else slice(first + step - 1, first + step)
                call = step_kwargs(kwargs, ids, columns)
                call = {**kwargs, **call} if step == 0 else call
                output = pair.model(**call, past_key_values=caches[request], use_cache=True)
                caches[request] = output.past_key_values
                if request == 1:
                    logits.append(output.logits)
        assert len(latents_of(caches[0], 0)) == 2
        assert torch.equal(ordinary(pair.tokens, torch.cat(logits, 1)), ordinary(pair.tokens, expected))
        images = {
            name: value for name, value in pair.kwargs(SEEING).items() if "ids" not in name and "mask" not in name
        }
        features = [model.model.get_image_features(**images).pooler_output for model in (pair.model, pair.source)]
    for own, plain in zip(*(each if isinstance(each, list | tuple) else [each] for each in features), strict=True):
        assert torch.equal(own, plain)
    for name, parameter in pair.source.named_parameters():
        same = pair.model.get_parameter(name)
        rows = (
            [row for row in range(len(parameter)) if row not in pair.tokens.ids]
            if "embed" in name or "head" in name
            else ...
        )
        assert torch.equal(same[rows], parameter[rows]), name


# -- conversations -----------------------------------------------------------------------------------------------
@every_former
@pytest.mark.parametrize("model_type", [each for each in FAMILIES if each != "llava_onevision"])
def test_a_second_turn_with_a_second_image(vismem_pair: Pairs, model_type: str, short_former: str) -> None:
    """The cache goes on; memory of the second turn sees both images. LLaVA-OneVision sees an image otherwise where
    another is in its row, so turns of it cannot be fed one by one."""
    pair = vismem_pair(model_type, short_former)
    short, long = span(pair.tokens, "short"), span(pair.tokens, "long")
    both = pair.kwargs(SEEING, Prompt("And this?", (image(64, 96, 5),)))
    first, second = pair.kwargs(SEEING), pair.kwargs(Prompt("And this?", (image(64, 96, 5),)))
    said = [7, *short, 8, *long, 9]
    answer = [20, *long, 21, *short, 22, 23]
    turn = extended(first, [said])
    whole = extended(extended(turn, second["input_ids"].tolist()), [answer])
    if "mm_token_type_ids" in whole:
        whole["mm_token_type_ids"] = torch.isin(
            whole["input_ids"], torch.tensor(pair.model.config.image_token_id)
        ).long()
    images = {name: value for name, value in both.items() if "ids" not in name and "mask" not in name}
    whole |= images
    prompt_length, turn_length = first["input_ids"].shape[1], turn["input_ids"].shape[1]
    second_end = whole["input_ids"].shape[1] - len(answer)

    calls: list[tuple[Any, ...]] = []
    hook = formed_of(pair.model, calls)
    first_logits, cache = decoded(pair.model, turn, prompt_length)
    positions = positions_of(pair.source, {**whole, "input_ids": worded(pair, whole["input_ids"])})
    own_images = {name: value for name, value in second.items() if "ids" not in name and "mask" not in name}
    logits = [first_logits]
    with torch.no_grad():
        columns = [
            slice(turn_length, second_end),
            *(slice(n, n + 1) for n in range(second_end, whole["input_ids"].shape[1])),
        ]
        for number, part in enumerate(columns):
            call = step_kwargs(whole, positions, part) | (own_images if number == 0 else {})
            output = pair.model(**call, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
    hook.remove()
    expected = plain_forward(pair, whole, latents_of(cache, 0))
    assert_equal(ordinary(pair.tokens, torch.cat(logits, 1)[0]), ordinary(pair.tokens, expected.logits))
    assert [images for *_, images in calls] == ([1, 1, 2, 2] if short_former == "vision" else [0] * 4)
    assert_equal(calls[-1][1], expected.last_hidden_states[expected.is_visual])

    # all of it in one call: what the first memory was formed of had no second image
    with pytest.raises(ValueError, match="row 0 calls for memory before an image of the same call: feed the convers"):
        pair.model(**whole)


def worded(pair: VisMemPair, ids: Tensor) -> Tensor:
    return torch.where(torch.isin(ids, torch.tensor(pair.tokens.ids)), 5, ids)


@torch.no_grad()
def test_an_image_that_was_cropped_away_is_not_looked_at_again(vismem_pair: Pairs) -> None:
    """As if it had never been shown."""
    pair = vismem_pair("internvl")
    words, seeing = pair.kwargs(WORDS), pair.kwargs(SEEING)
    whole = extended(words, seeing["input_ids"].tolist()) | {"pixel_values": seeing["pixel_values"]}
    length = words["input_ids"].shape[1]
    cache = pair.model(**whole, use_cache=True).past_key_values
    cache.crop(length - whole["input_ids"].shape[1])
    memory = InvokedMemory.of(cache)
    assert memory is not None and memory.length == length
    assert memory.images == [()] and not memory.seen(0)[0].numel()
    with pytest.raises(ValueError, match="short memory looks at an image again, and this row has none"):
        pair.model(input_ids=torch.tensor([[pair.tokens.invoke["short"]]]), past_key_values=cache)


# -- with others -------------------------------------------------------------------------------------------------
@every_former
@pytest.mark.parametrize("model_type", ["qwen3_vl", "qwen2_5_vl", "internvl"])
def test_beside_open_grafts(model_type: str, short_former: str, tmp_path: Any) -> None:
    """The plain model is then the one with the grafts alone."""
    grafts = ("pvm:layers=1,latent=32", "mixin:layers=2")

    def trained(model: PreTrainedModel) -> None:
        randomise_grafts(model)
        randomise_vismem(model)

    pair = VisMemPair.create(
        tmp_path, model_type, *grafts, "memory-tokens", f"{VISMEM},short_former={short_former}", trained=trained
    )
    grafted = VisMemPair.create(tmp_path / "grafts", model_type, *grafts, trained=randomise_grafts)
    pair.__dict__["source"] = grafted.model
    assert any("pvm" in name for name, _ in grafted.model.named_parameters())
    prompt, answer = pair.kwargs(TWO), answers_of(pair)[2]
    whole = extended(prompt, [answer])
    logits, cache = decoded(pair.model, whole, prompt["input_ids"].shape[1])
    expected = plain_forward(pair, whole, latents_of(cache, 0))
    assert_equal(ordinary(pair.tokens, logits[0]), ordinary(pair.tokens, expected.logits))
    with torch.no_grad():
        assert_equal(pair.model(**whole).logits, logits)


@pytest.mark.parametrize("positions", ["plain", "dhr", None])
@pytest.mark.parametrize("size", [(42, 42), (90, 42)])
def test_beside_positions_of_its_own(size: tuple[int, int], positions: Any, tmp_path: Any) -> None:
    """RoPE-DHR, in one forward of the model: an image of one tile, and of several."""
    pair = VisMemPair.create(tmp_path, "internvl", "rope-dhr", "memory-tokens", VISMEM)
    alone = VisMemPair.create(tmp_path / "dhr", "internvl", "rope-dhr", trained=lambda model: None)
    kwargs = pair.kwargs(Prompt("What is it?", (image(*size),)))
    kwargs["positions"] = positions
    with torch.no_grad():
        logits, expected = (ordinary(pair.tokens, model(**kwargs).logits) for model in (pair.fresh, alone.model))
    assert torch.equal(logits, expected)


@every_former
@torch.no_grad()
def test_a_model_that_accelerate_offloads(short_former: str, vismem_pair: Pairs) -> None:
    pair = vismem_pair("qwen3_vl", short_former)
    whole = extended(pair.kwargs(SEEING), [answers_of(pair)[0]])
    model = models.load(pair.directory / "trained").double()
    expected = model(**whole).logits
    cpu_offload(model, torch.device("cpu"))
    assert model.model.vismem.long.memory_init.device.type == "meta"
    assert_equal(model(**whole).logits, expected)


# -- refusals ----------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_what_cannot_be_is_refused(vismem_pair: Pairs) -> None:
    pair = vismem_pair("qwen3_vl")
    model, tokens = pair.model, pair.tokens
    short, long = span(tokens, "short"), span(tokens, "long")

    def refused(row: list[int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            model(input_ids=torch.tensor([row]))

    refused([5, tokens.placeholder], "row 0 has a placeholder at column 1 that no invocation is for")
    refused([5, *long[:-1], tokens.placeholder], "row 0 has a placeholder at column 7 that no invocation is for")
    refused([5, *long, tokens.placeholder], "row 0 has a placeholder at column 8 that no invocation is for")
    refused([5, long[0], 6, tokens.placeholder], "row 0 has a placeholder at column 3 that no invocation is for")
    refused([5, *short], "short memory looks at an image again, and this row has none")
    with pytest.raises(ValueError, match="called past its base model"):
        model.model.language_model(input_ids=torch.tensor([[5]]))
    cache = model(input_ids=torch.tensor([[5], [6]]), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="the cache is of 2 rows and the call of 1"):
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    model(input_ids=torch.tensor([[5], [6]]), past_key_values=cache)  # nothing was lost of it
    filled = DynamicCache(config=model.config.text_config)
    pair.source(input_ids=torch.tensor([[5, 6]]), past_key_values=filled)
    with pytest.raises(ValueError, match="the cache holds 2 tokens and what is remembered of them is of 0"):
        model(input_ids=torch.tensor([[5]]), past_key_values=filled)


def test_the_families_are_those_that_have_a_case() -> None:
    assert all(family(model_type).tower is not None for model_type in FAMILIES)
