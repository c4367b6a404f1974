import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from exporters.onnxruntime import BundleRuntime
from pairs import MAX_LENGTH, Pair, image
from surgeon.errors import BundleError, InputError
from surgeon.generation import Sampling
from surgeon.inputs import Prompt

PROMPTS = [
    Prompt("What is it?", (image(64, 96),)),
    Prompt("A star is a"),
    Prompt("Compare them.", (image(64, 64, 1), image(96, 128, 3))),
]


@pytest.fixture
def pair(export: Callable[..., Pair]) -> Pair:
    return export("qwen3_vl")


@pytest.fixture
def runtime(pair: Pair) -> BundleRuntime:
    return BundleRuntime(pair.bundle, threads=1)


def ending(runtime: BundleRuntime, eos: list[int]) -> BundleRuntime:
    """The same runtime with other end tokens."""
    tokens = runtime.manifest.tokens.model_copy(update={"eos": eos})
    runtime.manifest = runtime.manifest.model_copy(update={"tokens": tokens})
    return runtime


def test_greedy_tokens_are_those_of_transformers(pair: Pair, runtime: BundleRuntime) -> None:
    generations = ending(runtime, []).generate(PROMPTS, 12)
    expected, _ = pair.greedy(pair.inputs.prepare(PROMPTS), 12)
    assert [g.token_ids for g in generations] == expected.tolist()
    assert [g.finish_reason for g in generations] == ["length"] * 3
    assert [g.text for g in generations] == [pair.inputs.decode(ids) for ids in expected]


def test_rows_stop_at_their_own_end(pair: Pair, runtime: BundleRuntime) -> None:
    """The tokens of a row do not change because another stopped."""
    free = [g.token_ids for g in ending(runtime, []).generate(PROMPTS, 12)]
    eos = next(token for token in free[1][:-1] if token not in free[0])
    generations = ending(runtime, [eos]).generate(PROMPTS, 12)
    for generation, tokens in zip(generations, free, strict=True):
        end = tokens.index(eos) + 1 if eos in tokens else 12
        assert generation.token_ids == tokens[:end]
        assert generation.finish_reason == ("stop" if eos in tokens else "length")
    assert (generations[0].finish_reason, generations[1].finish_reason) == ("length", "stop")


def test_text_streams_as_it_comes(runtime: BundleRuntime) -> None:
    pieces: list[tuple[int, str]] = []
    generations = ending(runtime, []).generate(PROMPTS, 20, on_text=lambda row, text: pieces.append((row, text)))
    assert all(text for _, text in pieces)
    for row, generation in enumerate(generations):
        assert "".join(text for of, text in pieces if of == row) == generation.text
    # rows take turns: were each streamed only at its end, there would be one run of pieces a row (which bytes
    # of an untrained model's tokens make whole letters, and so when, differs from one processor to the next)
    assert len([row for row, _ in itertools.groupby(pieces, key=lambda piece: piece[0])]) > len(PROMPTS)


def test_sampling_is_repeatable_and_not_greedy(runtime: BundleRuntime) -> None:
    ending(runtime, [])
    first, again, other = (
        [g.token_ids for g in runtime.generate(PROMPTS, 8, Sampling(temperature=1.5, seed=seed))] for seed in (1, 1, 2)
    )
    assert first == again and first != other
    assert first != [g.token_ids for g in runtime.generate(PROMPTS, 8)]


def test_the_bundles_length_ends_a_row(runtime: BundleRuntime) -> None:
    ending(runtime, [])
    words = 1
    while runtime.prepare([Prompt("word " * words)]).lengths[0] < MAX_LENGTH - 6:
        words += 1
    prompt = Prompt("word " * words)
    length = int(runtime.prepare([prompt]).lengths[0])
    long, short = runtime.generate([prompt, Prompt("word")], 20)
    assert len(long.token_ids) == MAX_LENGTH - length < 20 and long.finish_reason == "length"
    assert len(short.token_ids) == 20
    alone = runtime.generate([Prompt("word")], 20)[0]
    assert short == alone


def test_no_tokens_asked_for(runtime: BundleRuntime) -> None:
    (generation,) = runtime.generate(PROMPTS[:1], 0)
    assert (generation.text, generation.token_ids, generation.finish_reason) == ("", [], "length")


def test_prompts_that_cannot_be(runtime: BundleRuntime, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=f"exported for {MAX_LENGTH}"):
        runtime.generate([Prompt("word " * MAX_LENGTH)], 4)
    with pytest.raises(InputError, match="does not exist"):
        runtime.generate([Prompt("what", (tmp_path / "none.png",))], 4)
    assert np.isfinite(runtime.start(runtime.prepare(PROMPTS[:1]))[1]).all(), "and goes on working"
