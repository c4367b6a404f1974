import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from surgeon.errors import OptionError, SurgeonError
from surgeon.generation import Rows, Sampling, TextStream, sample

LOGITS = np.random.default_rng(0).normal(size=(1, 12)).astype(np.float32) * 2


def frequencies(sampling: Sampling, draws: int = 20_000) -> np.ndarray:
    tokens = sample(np.repeat(LOGITS, draws, 0), sampling, sampling.generators(draws))
    return np.bincount(tokens, minlength=LOGITS.shape[1]) / draws


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = np.array([[0.0, 3.0, 1.0], [2.0, 2.0, -5.0]], dtype=np.float32)
    tokens = sample(logits, Sampling(), Sampling().generators(len(logits)))
    assert tokens.tolist() == [1, 0] and tokens.dtype == np.int64


@pytest.mark.parametrize(
    ("sampling", "warpers"),
    [
        (Sampling(temperature=0.7), [TemperatureLogitsWarper(0.7)]),
        (Sampling(temperature=1.0, top_k=3), [TopKLogitsWarper(3)]),
        (Sampling(temperature=1.0, top_p=0.6), [TopPLogitsWarper(0.6)]),
        (
            Sampling(temperature=1.5, top_k=6, top_p=0.8),
            [TemperatureLogitsWarper(1.5), TopKLogitsWarper(6), TopPLogitsWarper(0.8)],
        ),
    ],
)
def test_distribution_is_that_of_transformers(sampling: Sampling, warpers: list) -> None:
    scores = torch.from_numpy(LOGITS.copy())
    for warper in warpers:
        scores = warper(None, scores)
    expected = scores.softmax(-1)[0].numpy()
    observed = frequencies(sampling)
    assert ((observed > 0) <= (expected > 0)).all()
    np.testing.assert_allclose(observed, expected, atol=4 * math.sqrt(0.25 / 20_000))


@pytest.mark.parametrize(("top_p", "kept"), [(0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.76, 4), (1.0, 4)])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: int) -> None:
    """Four tokens of a quarter each, whose sums are exact: a set that sums to p is enough."""
    logits = np.repeat(np.zeros((1, 4), dtype=np.float32), 200, 0)
    sampling = Sampling(temperature=1.0, top_p=top_p)
    assert set(sample(logits, sampling, sampling.generators(len(logits))).tolist()) == set(range(kept))


def test_a_seed_repeats_and_another_does_not() -> None:
    logits = np.repeat(LOGITS, 50, 0)
    first, again, other = (
        sample(logits, s, s.generators(len(logits))).tolist()
        for s in (Sampling(1.0, seed=3), Sampling(1.0, seed=3), Sampling(1.0, seed=4))
    )
    assert first == again != other


def test_a_row_does_not_depend_on_the_others() -> None:
    sampling = Sampling(temperature=1.0)
    alone = np.concatenate((LOGITS, np.zeros_like(LOGITS)))
    among = np.concatenate((LOGITS, -LOGITS * 5))
    tokens = [sample(logits, sampling, sampling.generators(len(logits)))[0] for logits in (alone, among)]
    assert tokens[0] == tokens[1]


def test_a_tiny_temperature_is_greedy() -> None:
    logits = np.array([[1.0, 3.0, 2.9999]], dtype=np.float32)
    assert sample(logits, Sampling(temperature=1e-310), Sampling(temperature=1e-310).generators(1)).tolist() == [1]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_overflowed_logits_are_an_error(bad: float, temperature: float) -> None:
    logits = np.repeat(LOGITS, 2, 0)
    logits[1, 4] = bad
    sampling = Sampling(temperature)
    with pytest.raises(SurgeonError, match=r"row\(s\) \[1\] are not finite"):
        sample(logits, sampling, sampling.generators(len(logits)))


def test_minus_infinity_forbids_a_token() -> None:
    logits = LOGITS.copy()
    logits[0, LOGITS.argmax()] = -np.inf
    sampling = Sampling(temperature=1.0)
    tokens = sample(np.repeat(logits, 500, 0), sampling, sampling.generators(500))
    assert LOGITS.argmax() not in tokens


@pytest.mark.parametrize(
    "options", [{"temperature": -1.0}, {"temperature": math.nan}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_settings_out_of_range(options: dict) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        Sampling(**options)


# -- rows --------------------------------------------------------------------------------------------------------
def test_rows_end_by_their_own_tokens_and_limits() -> None:
    rows = Rows([[7], [8, 9], [7], [7]], [5, 5, 2, 0])
    assert rows.active.tolist() == [True, True, True, False]
    rows.push(np.array([1, 7, 1, 1]))
    rows.push(np.array([7, 9, 1, 1]))
    assert rows.token_ids == [[1, 7], [7, 9], [1, 1], []]
    assert rows.finish_reasons == ["stop", "stop", "length", "length"]
    rows.push(np.array([1, 1, 1, 1]))
    assert rows.token_ids == [[1, 7], [7, 9], [1, 1], []]


def test_a_last_token_that_ends_a_row_is_a_stop() -> None:
    rows = Rows([[7]], [1])
    rows.push(np.array([7]))
    assert rows.finish_reasons == ["stop"]


# -- text --------------------------------------------------------------------------------------------------------
def bytes_to_text(ids: list[int]) -> str:
    """A tokenizer of bytes: every character beyond ASCII is several tokens."""
    return bytes(ids).decode("utf-8", errors="replace")


def stream(ids: bytes) -> list[str]:
    text = TextStream(bytes_to_text)
    return [text.push(token) for token in ids] + [text.finish()]


@given(st.text(max_size=12))
def test_text_comes_whole_character_by_character(text: str) -> None:
    text = text.replace("\N{REPLACEMENT CHARACTER}", "")
    pieces = stream(text.encode())
    assert "".join(pieces) == text
    assert [piece for piece in pieces if piece] == list(text)


@given(st.binary(max_size=12))
def test_any_tokens_give_the_decoded_whole(ids: bytes) -> None:
    assert "".join(stream(ids)) == bytes_to_text(list(ids))


def test_an_incomplete_end_is_told_at_the_end() -> None:
    assert stream("aé".encode()[:2]) == ["a", "", "\N{REPLACEMENT CHARACTER}"]


def test_a_tokenizer_that_strips_the_start_of_a_text() -> None:
    words = {0: " once", 1: " upon", 2: " a", 3: " time"}
    text = TextStream(lambda ids: "".join(words[i] for i in ids).lstrip())
    assert [text.push(i) for i in range(4)] == ["once", " upon", " a", " time"]
