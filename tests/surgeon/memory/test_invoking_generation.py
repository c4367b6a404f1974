"""`generate` of a model that calls for memory: when it does, what counts, and every search."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from checkpoints import has_tokenizer
from surgeon.memory.invoked_memory import InvokedMemory
from surgeon.memory.memory_tokens import MAX_INVOCATIONS, Kind, MemoryTokens
from vismem_models import SEEING, TWO, WORDS, VisMemPair, extended, plain_forward, positions_of, span

pytestmark = pytest.mark.skipif(not has_tokenizer(), reason="needs the demo checkpoint's tokenizer")
LENGTH = 12
GREEDY = {"max_new_tokens": LENGTH, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def pair(vismem_pair: Callable[..., VisMemPair]) -> VisMemPair:
    return vismem_pair("qwen3_vl")


class Wanting(LogitsProcessor):
    """Makes a memory the likeliest where a row's answer has so many tokens that the caller sees, unless memory is
    forbidden there."""

    def __init__(self, tokens: MemoryTokens, prompt_length: int, wishes: list[dict[int, Kind]]) -> None:
        self.tokens, self.prompt_length, self.wishes = tokens, prompt_length, wishes

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for row, (ids, wishes) in enumerate(zip(input_ids, self.wishes, strict=True)):
            answer = ids[self.prompt_length :].tolist()
            visible = sum(token not in self.tokens.ids for token in answer)
            if kind := wishes.get(visible) if not answer or answer[-1] not in self.tokens.end.values() else None:
                token = self.tokens.invoke[kind]
                scores[row, token] += 1e4
        return scores


def wanting(pair: VisMemPair, kwargs: dict[str, Any], *wishes: dict[int, Kind]) -> LogitsProcessorList:
    return LogitsProcessorList([Wanting(pair.tokens, kwargs["input_ids"].shape[1], list(wishes))])


def answers(pair: VisMemPair, kwargs: dict[str, Any], model: Any = None, **options: Any) -> list[list[int]]:
    sequences = (pair.model if model is None else model).generate(**kwargs, **{**GREEDY, **options})
    ids: list[list[int]] = sequences[:, kwargs["input_ids"].shape[1] :].tolist()
    return ids


def visible(pair: VisMemPair, answer: list[int]) -> list[int]:
    return [token for token in answer if token not in pair.tokens.ids]


def invoked(pair: VisMemPair, answer: list[int]) -> list[tuple[int, Kind]]:
    """How many tokens the caller sees before each invocation, and its kind. Raises AssertionError where a memory token
    stands anywhere but in a whole invocation."""
    places, rest, count = [], list(answer), 0
    while rest:
        kind = pair.tokens.kind_of(rest[0])
        length = 1
        if kind is not None:
            length = len(span(pair.tokens, kind))
            assert rest[:length] == span(pair.tokens, kind), answer
            places.append((count, kind))
        else:
            assert rest[0] not in pair.tokens.ids, answer
            count += 1
        rest = rest[length:]
    return places


# -- when ---------------------------------------------------------------------------------------------------------
def test_off_is_the_plain_model_without_memory_tokens(pair: VisMemPair) -> None:
    kwargs = pair.kwargs(SEEING, WORDS, TWO)
    expected = answers(pair, kwargs, pair.source, suppress_tokens=list(pair.tokens.ids))
    wishes = wanting(pair, kwargs, {0: "long", 3: "short"}, {2: "long"}, {1: "short"})
    assert answers(pair, kwargs, memory="off", logits_processor=wishes) == expected
    assert answers(pair, kwargs, max_invocations=0, logits_processor=wishes) == expected
    assert answers(pair, kwargs, memory="off", max_invocations=5, logits_processor=wishes) == expected


def test_auto_is_when_the_model_says_so(pair: VisMemPair) -> None:
    """Rows call when they like; what comes before is the plain model's, and every token after an invocation is the
    likeliest of the plain model over its latents."""
    kwargs = pair.kwargs(SEEING, WORDS, TWO)
    length = kwargs["input_ids"].shape[1]
    wishes = wanting(pair, kwargs, {2: "short", 5: "long"}, {4: "long"}, {})
    images = [pair.model.config.image_token_id]  # an answer has none
    output = pair.model.generate(
        **kwargs, **GREEDY, suppress_tokens=images, logits_processor=wishes, return_dict_in_generate=True
    )
    ids = output.sequences[:, length:].tolist()
    memory = InvokedMemory.of(output.past_key_values)
    assert memory is not None
    plain = answers(pair, kwargs, pair.source, suppress_tokens=[*pair.tokens.ids, *images])
    assert visible(pair, ids[2])[:LENGTH] == plain[2]
    for row, (prompt, places) in enumerate([(SEEING, [(2, "short"), (5, "long")]), (WORDS, [(4, "long")]), (TWO, [])]):
        answer = ids[row][: _end_of(pair, ids[row])]
        assert invoked(pair, answer) == places and len(visible(pair, answer)) == LENGTH
        assert not any(ids[row][len(answer) :])
        first = places[0][0] if places else LENGTH
        assert answer[:first] == plain[row][:first]
        alone = pair.kwargs(prompt)
        forward = plain_forward(pair, extended(alone, [answer]), [each.latents for each in memory.invocations[row]])
        start = alone["input_ids"].shape[1] - 1
        likeliest = forward.logits[start:-1].clone()
        likeliest[:, [*pair.tokens.ids, *images]] = -torch.inf
        for token, best in zip(answer, likeliest.argmax(-1).tolist(), strict=True):
            assert token in pair.tokens.ids or token == best
    assert [len(each) for each in memory.invocations] == [2, 1, 0]


def _end_of(pair: VisMemPair, answer: list[int]) -> int:
    """Where a row's answer ends, and its padding begins."""
    count = 0
    for place, token in enumerate(answer, 1):
        count += token not in pair.tokens.ids
        if count == LENGTH:
            return place
    return len(answer)


def test_always_is_at_the_beginning_and_behind_separators(pair: VisMemPair) -> None:
    kwargs = pair.kwargs(SEEING, TWO)
    separators = pair.tokens.separators
    assert {pair.inputs.tokenizer.decode([token]) for token in separators} >= {".", "!", "?", "\n"}

    def separating(input_ids: Tensor, scores: Tensor) -> Tensor:
        """A separator as each third token that the caller sees."""
        for row, ids in enumerate(input_ids[:, kwargs["input_ids"].shape[1] :].tolist()):
            if len(visible(pair, ids)) % 3 == 2:
                scores[row, separators[row]] += 1e4
        return scores

    options = {"logits_processor": LogitsProcessorList([separating])}
    for most, count in ((None, 4), (2, 2), (0, 0)):
        ids = answers(pair, kwargs, memory="always", max_invocations=most, **options)
        places = [[place for place, _ in invoked(pair, answer)] for answer in ids]
        # the last separator is the last token: nothing follows it
        assert places == [[0, 3, 6, 9][:count]] * 2
    assert [visible(pair, answer)[2] for answer in ids] == list(separators[:2])


def test_always_calls_for_the_likelier_kind(pair: VisMemPair) -> None:
    kwargs = pair.kwargs(SEEING)
    with torch.no_grad():
        logits = pair.model(**kwargs).logits[0, -1]
    short, long = (logits[pair.tokens.invoke[kind]] for kind in ("short", "long"))
    (answer,) = answers(pair, kwargs, memory="always", max_invocations=1)
    assert invoked(pair, answer) == [(0, "short" if short > long else "long")]


def test_no_more_than_max_invocations(pair: VisMemPair) -> None:
    kwargs = pair.kwargs(SEEING, TWO)
    greedy_for_memory: list[dict[int, Kind]] = [{n: "short" for n in range(LENGTH)}, {n: "long" for n in range(LENGTH)}]
    for most in (1, 3, None):
        ids = answers(pair, kwargs, max_invocations=most, logits_processor=wanting(pair, kwargs, *greedy_for_memory))
        for answer, kind in zip(ids, ("short", "long"), strict=True):
            count = MAX_INVOCATIONS if most is None else most
            end = _end_of(pair, answer)
            assert invoked(pair, answer[:end]) == [(n, kind) for n in range(count)]


def test_rows_without_images_have_no_short_memory(pair: VisMemPair, vismem_pair: Callable[..., VisMemPair]) -> None:
    for each, kind in ((pair, None), (vismem_pair("qwen3_vl", "language"), "short")):
        for prompts in ((WORDS,), (SEEING, WORDS)):
            kwargs = each.kwargs(*prompts)
            wishes = wanting(each, kwargs, *[{3: "short"} for _ in prompts])
            *others, words = answers(each, kwargs, logits_processor=wishes)
            assert invoked(each, words) == ([] if kind is None else [(3, kind)])
            assert all(invoked(each, answer[: _end_of(each, answer)]) == [(3, "short")] for answer in others)
        # with beams the rows are each prompt's, several times
        kwargs = each.kwargs(SEEING, WORDS)
        ids = each.model.generate(**kwargs, **GREEDY, num_beams=2, memory="always", max_invocations=1)
        kinds = [
            invoked(each, answer[: _end_of(each, answer)]) for answer in ids[:, kwargs["input_ids"].shape[1] :].tolist()
        ]
        assert all(len(own) == 1 for own in kinds) and (kind or kinds[1] == [(0, "long")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "never"}, "memory='never': choose one of 'auto', 'off', 'always'"),
        ({"memory": True}, "memory=True: choose one of"),
        ({"max_invocations": -1}, "max_invocations=-1: it is how many invocations an answer has at most, 0 or more"),
        ({"max_invocations": 1.5}, "max_invocations=1.5: it is how many"),
        ({"max_invocations": True}, "max_invocations=True: it is how many"),
    ],
)
def test_bad_values_are_refused(pair: VisMemPair, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        pair.model.generate(**pair.kwargs(WORDS), **GREEDY, **options)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize("how", ["assistant", "prompt lookup"])
def test_assisted_decoding_is_refused(pair: VisMemPair, how: str) -> None:
    kwargs = pair.kwargs(WORDS)
    options = {"assistant_model": pair.source} if how == "assistant" else {"prompt_lookup_num_tokens": 2}
    with pytest.raises(ValueError, match="^assisted decoding does not go with memory that is called for: pass .*$"):
        pair.model.generate(**kwargs, **GREEDY, **options)
    if how == "prompt lookup":
        assert answers(pair, kwargs, memory="off", **options) == answers(pair, kwargs, memory="off")


# -- what counts --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["max_new_tokens", "max_length"])
def test_lengths_are_of_what_the_caller_sees(pair: VisMemPair, how: str) -> None:
    kwargs = pair.kwargs(SEEING)
    limit = (
        {"max_new_tokens": 5}
        if how == "max_new_tokens"
        else {"max_new_tokens": None, "max_length": kwargs["input_ids"].shape[1] + 5}
    )
    wishes = wanting(pair, kwargs, {0: "long", 4: "short", 5: "long"})
    (answer,) = answers(pair, kwargs, logits_processor=wishes, **limit)
    assert invoked(pair, answer) == [(0, "long"), (4, "short")] and len(visible(pair, answer)) == 5


@pytest.mark.parametrize("how", ["min_new_tokens", "min_length"])
def test_an_answer_has_as_many_tokens_as_it_must(pair: VisMemPair, how: str) -> None:
    """Of those that the caller sees."""
    kwargs = pair.kwargs(SEEING)
    length = kwargs["input_ids"].shape[1]

    def ending(input_ids: Tensor, scores: Tensor) -> Tensor:
        """The end of the answer would be the likeliest from the first token on."""
        scores[:, 9] += 1e3
        return scores

    processors = LogitsProcessorList([*wanting(pair, kwargs, {0: "long", 2: "short"}), ending])
    options = {"logits_processor": processors, "eos_token_id": 9}
    assert answers(pair, kwargs, logits_processor=[ending], eos_token_id=9, memory="off") == [[9]]
    (answer,) = answers(pair, kwargs, **options, **{how: 6 if how == "min_new_tokens" else length + 6})
    assert invoked(pair, answer) == [(0, "long"), (2, "short")]
    assert len(visible(pair, answer)) == 7 and visible(pair, answer).index(9) == 6
    (answer,) = answers(pair, kwargs, **options)
    assert visible(pair, answer) == [9] and invoked(pair, answer) == [(0, "long")]


def test_each_row_ends_where_it_does(pair: VisMemPair) -> None:
    kwargs = pair.kwargs(SEEING, TWO)
    wishes = wanting(pair, kwargs, {1: "short"}, {1: "long", 3: "long"})
    whole = answers(pair, kwargs, logits_processor=wishes)
    eos = visible(pair, whole[0])[3]
    assert eos not in visible(pair, whole[1]) and visible(pair, whole[0]).index(eos) == 3
    ended = answers(pair, kwargs, logits_processor=wishes, eos_token_id=eos, pad_token_id=1)
    place = whole[0].index(eos) + 1
    assert ended[0] == whole[0][:place] + [1] * (len(ended[0]) - place)
    assert ended[1] == whole[1]


# -- searches -----------------------------------------------------------------------------------------------------
def test_sampling_repeats_with_its_seed(pair: VisMemPair) -> None:
    kwargs = pair.kwargs(SEEING, TWO)

    def sampled(seed: int, **options: Any) -> list[list[int]]:
        torch.manual_seed(seed)
        return answers(pair, kwargs, do_sample=True, temperature=1.5, top_k=50, memory="always", **options)

    first = sampled(1)
    assert sampled(1) == first != sampled(2)
    for answer in (*first, *sampled(3, top_p=0.5, repetition_penalty=1.3, no_repeat_ngram_size=2)):
        assert invoked(pair, answer[: _end_of(pair, answer)])


def test_several_answers_to_a_prompt(pair: VisMemPair) -> None:
    """Each of its own memories; greedy ones are all alike."""
    kwargs = pair.kwargs(SEEING, WORDS)
    wishes = wanting(pair, kwargs, *[{2: "short"}] * 3, *[{2: "long"}] * 3)
    torch.manual_seed(0)
    sampled = answers(pair, kwargs, do_sample=True, top_k=1, num_return_sequences=3, logits_processor=wishes)
    single = answers(pair, kwargs, logits_processor=wanting(pair, kwargs, {2: "short"}, {2: "long"}))
    assert sampled == [single[0]] * 3 + [single[1]] * 3


class Tempting(LogitsProcessor):
    """Makes a memory a little likelier than the likeliest token behind every third token of the vocabulary: beams call
    at different steps, and change places while one of them is within an invocation."""

    def __init__(self, pair: VisMemPair) -> None:
        self.pair = pair

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for row, token in enumerate(input_ids[:, -1].tolist()):
            invoke = self.pair.tokens.invoke["long" if token % 2 else "short"]
            if token % 3 == 0 and token not in self.pair.tokens.ids and scores[row, invoke] > -torch.inf:
                scores[row, invoke] = scores[row].max() + 0.1
        return scores


@pytest.mark.parametrize("returned", [1, 4])
def test_latents_go_with_their_beams(pair: VisMemPair, returned: int) -> None:
    """One forward over what a beam search found has the scores that it reported: every beam had its own latents."""
    kwargs = pair.kwargs(SEEING, TWO)
    length = kwargs["input_ids"].shape[1]
    never = [pair.model.config.image_token_id, 3]
    options = {**GREEDY, "num_beams": 4, "num_return_sequences": returned, "length_penalty": 0.0, "eos_token_id": 3}
    output = pair.model.generate(
        **kwargs,
        **options,
        suppress_tokens=never,
        logits_processor=LogitsProcessorList([Tempting(pair)]),
        return_dict_in_generate=True,
        output_scores=True,
    )
    transitions = pair.model.compute_transition_scores(
        output.sequences, output.scores, output.beam_indices, normalize_logits=False
    )
    torch.testing.assert_close(transitions.sum(1), output.sequences_scores)
    assert len({tuple(row) for row in output.sequences.tolist()}) == 2 * returned
    counts = []
    for number, sequence in enumerate(output.sequences[:, length:].tolist()):
        answer = sequence[: _end_of(pair, sequence)]
        counts.append(len(invoked(pair, answer)))
        prompt = pair.kwargs((SEEING, TWO)[number // returned])
        whole = extended(prompt, [answer])
        with torch.no_grad():
            replayed = pair.model(**whole, position_ids=positions_of(pair.model, whole)).logits[0]
        start = prompt["input_ids"].shape[1] - 1
        scores = replayed[start:-1].float().log_softmax(-1)
        for place, token in enumerate(answer):
            if token not in pair.tokens.ids:
                torch.testing.assert_close(transitions[number, place], scores[place, token], atol=1e-4, rtol=0)
    assert sum(counts) > 2 * returned
    # and beams changed places while one of them was within an invocation
    beams = output.beam_indices[:, 1:] - output.beam_indices[:, :-1]
    forced = torch.tensor(
        [[token == pair.tokens.placeholder for token in row] for row in output.sequences[:, length + 1 :].tolist()]
    )
    assert bool((beams[:, : forced.shape[1]] * forced != 0).any())


def test_a_static_cache(pair: VisMemPair) -> None:
    kwargs = pair.kwargs(SEEING, WORDS)
    wishes = wanting(pair, kwargs, {1: "short", 4: "long"}, {2: "long"})
    expected = answers(pair, kwargs, logits_processor=wishes)
    assert answers(pair, kwargs, logits_processor=wishes, cache_implementation="static") == expected
    assert sum(token in pair.tokens.ids for token in expected[0]) == 12


@pytest.mark.parametrize("short_former", ["vision", "language"])
def test_without_a_cache(vismem_pair: Callable[..., VisMemPair], short_former: str) -> None:
    """Every step goes over everything again, invocations included."""
    pair = vismem_pair("qwen3_vl", short_former)
    kwargs = pair.kwargs(SEEING, WORDS, TWO)
    wishes = wanting(pair, kwargs, {1: "short", 4: "long"}, {2: "long"}, {0: "short", 1: "short"})
    expected = answers(pair, kwargs, logits_processor=wishes)
    assert answers(pair, kwargs, logits_processor=wishes, use_cache=False) == expected


def test_a_later_turn_by_generate(pair: VisMemPair) -> None:
    """The whole conversation and the cache of its first turn; a row whose only image came in the first turn has short
    memory in the second."""
    kwargs = pair.kwargs(SEEING)
    wishes = wanting(pair, kwargs, {1: "short"})
    first = pair.model.generate(**kwargs, **GREEDY, logits_processor=wishes, return_dict_in_generate=True)
    asked = torch.tensor([[20, 21, 22]])
    ids = torch.cat((first.sequences, asked), 1)
    later = {**kwargs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    later["mm_token_type_ids"] = (ids == pair.model.config.image_token_id).long()
    wishes = wanting(pair, later, {0: "long", 2: "short"})
    options = {"logits_processor": wishes, "max_invocations": 2}  # the first turn's do not count
    alone = answers(pair, later, **options)
    assert invoked(pair, alone[0]) == [(0, "long"), (2, "short")]
    assert answers(pair, later, **options, past_key_values=first.past_key_values) == alone


def test_a_later_turn_knows_which_rows_have_seen_an_image(pair: VisMemPair) -> None:
    """One row's came in the first turn, the other's in the second."""
    first = pair.kwargs(SEEING, WORDS)
    cache = pair.model(**first, use_cache=True).past_key_values
    second = pair.kwargs(WORDS, SEEING)
    later = {
        name: torch.cat((first[name], second[name]), 1) for name in ("input_ids", "attention_mask", "mm_token_type_ids")
    }
    later |= {name: torch.cat((first[name], second[name])) for name in ("pixel_values", "image_grid_thw")}
    for prompts, kwargs in (((0, 1), later), ((0,), None)):
        if kwargs is None:  # a turn without images, of the row that had none
            words = torch.tensor([[20, 21, 22]] * 2)
            kwargs = extended(first, words.tolist())
            cache = pair.model(**first, use_cache=True).past_key_values
        wishes = wanting(pair, kwargs, {1: "short"}, {1: "short"})
        ids = answers(pair, kwargs, logits_processor=wishes, past_key_values=cache)
        for row, answer in enumerate(ids):
            places = invoked(pair, answer[: _end_of(pair, answer)])
            assert places == ([(1, "short")] if row in prompts else [])


def test_a_streamer_is_given_every_token(pair: VisMemPair) -> None:
    class Kept(BaseStreamer):
        def __init__(self) -> None:
            self.ids: list[int] = []

        def put(self, value: Tensor) -> None:
            self.ids += value.reshape(-1).tolist()

        def end(self) -> None: ...

    kwargs, kept = pair.kwargs(SEEING), Kept()
    sequences = pair.model.generate(
        **kwargs, **GREEDY, streamer=kept, logits_processor=wanting(pair, kwargs, {1: "short"})
    )
    assert kept.ids == sequences[0].tolist()


def test_nothing_of_a_request_stays(pair: VisMemPair) -> None:
    """Neither in the model nor in its generation config."""
    kwargs = pair.kwargs(SEEING)
    before = {name: set(vars(module)) for name, module in pair.model.named_modules()}
    settings = pair.model.generation_config.to_dict()
    expected = answers(pair, kwargs)
    answers(pair, kwargs, memory="always", max_invocations=2)
    assert pair.model.generation_config.to_dict() == settings
    assert {name: set(vars(module)) for name, module in pair.model.named_modules()} == before
    assert answers(pair, kwargs) == expected
