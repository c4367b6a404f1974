"""`surgeon generate` answers as transformers does, and refuses what is no image."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import surgeon.generation
from checkpoints import DEMO, has_tokenizer
from command import assert_refused, process, run
from surgeon import models
from surgeon.generation import Sampling
from surgeon.inputs import Prompt
from surgeon.torch_generate import TorchGenerator
from vismem_models import VisMemPair, span


@pytest.mark.skipif(not has_tokenizer(), reason="needs the demo checkpoint's tokenizer")
def test_generate_streams_the_answer_of_the_model(tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    Image.new("RGB", (96, 64), (200, 30, 30)).save(image)
    arguments = ("generate", DEMO, "--image", image, "--prompt", "Describe the picture.", "--max-new-tokens", 12)
    answer = json.loads(run(*arguments, "--json").stdout)
    streamed = process(*arguments)  # where nothing has set transformers up before
    assert streamed.stdout == answer["text"] + "\n" and streamed.stderr == ""

    # the same by transformers' own greedy search
    from surgeon.inputs import Inputs

    prepared = Inputs.from_directory(DEMO).prepare([Prompt("Describe the picture.", (image,))])
    model = models.load(DEMO)
    ids = model.generate(**prepared.model_kwargs(model.dtype), do_sample=False, max_new_tokens=12)
    assert answer["token_ids"] == ids[0, prepared.input_ids.shape[1] :].tolist()

    drawn = [json.loads(run(*arguments, "--json", "--temperature", 5, "--seed", seed).stdout) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert (
        TorchGenerator(DEMO).generate([Prompt("Describe the picture.", (image,))], 3)[0].token_ids
        == answer["token_ids"][:3]
    )


@pytest.mark.skipif(not has_tokenizer(), reason="needs the demo checkpoint's tokenizer")
def test_each_option_reaches_the_model(source: Path) -> None:
    def tokens(*options: object) -> list[int]:
        arguments = ("generate", source, "--prompt", "Describe the picture.", "--max-new-tokens", 8, "--json")
        token_ids: list[int] = json.loads(run(*arguments, *options).stdout)["token_ids"]
        return token_ids

    greedy = tokens()
    prompt = Prompt("Describe the picture.", system="Answer in French.")
    assert (
        tokens("--system", "Answer in French.") == TorchGenerator(source).generate([prompt], 8)[0].token_ids != greedy
    )
    # at a temperature that makes all tokens alike, what is left of them decides
    drawn = ("--temperature", 1000, "--seed", 3)
    assert tokens(*drawn) != greedy
    assert tokens(*drawn, "--top-k", 1) == tokens(*drawn, "--top-p", 1e-9) == greedy
    for options, sampling in (
        (("--top-k", 5), Sampling(1000, top_k=5, seed=3)),
        (("--top-p", 0.2), Sampling(1000, top_p=0.2, seed=3)),
    ):
        expected = TorchGenerator(source).generate([Prompt("Describe the picture.")], 8, sampling)[0].token_ids
        assert tokens(*drawn, *options) == expected != tokens(*drawn)


@pytest.mark.skipif(not has_tokenizer(), reason="needs the demo checkpoint's tokenizer")
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.png", b"no image", "is not an image"),
        ("a.png", b"\x89PNG\r\n\x1a\n" + b"\0" * 20, "a.png"),
        ("a.mp4", b"\0\0\0 ftypisom", "video is not supported yet"),
        ("a.png", None, "does not exist"),
    ],
)
def test_an_image_that_is_not_one(tmp_path: Path, name: str, content: bytes | None, expected: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert_refused(run("generate", DEMO, "--image", tmp_path / name, "--prompt", "Describe the picture."), expected)


needs_tokenizer = pytest.mark.skipif(not has_tokenizer(), reason="needs the demo checkpoint's tokenizer")
TRACED = re.compile(r"(short|long) memory behind token (\d+) of (\d+): \d+\.\d ms")


@needs_tokenizer
def test_memory_that_is_called_for_is_hidden_and_traced(vismem_pair: Callable[..., VisMemPair], tmp_path: Path) -> None:
    pair = vismem_pair("qwen3_vl")
    checkpoint = pair.directory / "trained"
    image = tmp_path / "a.png"
    Image.new("RGB", (96, 64), (200, 30, 30)).save(image)
    arguments = ("generate", checkpoint, "--image", image, "--prompt", "What is it?", "--max-new-tokens", 10)
    answer = json.loads(run(*arguments, "--memory", "always", "--json").stdout)
    assert len(answer["token_ids"]) == 10 and not set(answer["token_ids"]) & set(pair.tokens.ids)
    assert answer["invocations"][0]["token"] == 0 and answer["invocations"][0]["seconds"] > 0

    # as a process, streamed: the text alone on stdout, one line for each call for memory on stderr
    streamed = process(*arguments, "--memory", "always", "--trace")
    assert (streamed.returncode, streamed.stdout) == (0, answer["text"] + "\n")
    traced = [TRACED.fullmatch(line) for line in streamed.stderr.splitlines()]
    assert [match and (match[1], int(match[2]), match[3]) for match in traced] == [
        (each["kind"], each["token"], "10") for each in answer["invocations"]
    ]

    # the same by transformers' own search: what was hidden is there
    prepared = pair.inputs.prepare([Prompt("What is it?", (image,))])
    model = models.load(checkpoint)
    options = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 0}
    ids = model.generate(**prepared.model_kwargs(model.dtype), **options, memory="always")
    expected = ids[0, prepared.input_ids.shape[1] :].tolist()
    assert answer["token_ids"] == [token for token in expected if token not in pair.tokens.ids]
    kind = answer["invocations"][0]["kind"]
    assert expected[: len(span(pair.tokens, kind))] == span(pair.tokens, kind)

    off = json.loads(run(*arguments, "--memory", "off", "--json").stdout)
    none = json.loads(run(*arguments, "--memory", "always", "--max-invocations", 0, "--json").stdout)
    assert off["invocations"] == [] and off["token_ids"] == none["token_ids"] != answer["token_ids"]
    assert "called for no memory" in run(*arguments, "--memory", "off", "--trace").stderr


@needs_tokenizer
def test_memory_is_refused_where_there_is_none(source: Path) -> None:
    arguments = ("generate", source, "--prompt", "Hello", "--max-new-tokens", 2)
    for options in (("--memory", "always"), ("--max-invocations", 3)):
        assert_refused(run(*arguments, *options), "has no memory that it could call for: patch a checkpoint with")
    plain = json.loads(run(*arguments, "--json").stdout)
    for mode in ("auto", "off"):
        assert json.loads(run(*arguments, "--memory", mode, "--json").stdout) == plain
    assert run(*arguments, "--memory", "never").exit_code == run(*arguments, "--max-invocations", -1).exit_code == 2


@needs_tokenizer
@pytest.mark.parametrize("part", ["prompt", "system"])
def test_a_text_that_spells_a_memory_token_is_refused(vismem_pair: Callable[..., VisMemPair], part: str) -> None:
    checkpoint = vismem_pair("qwen3_vl").directory / "trained"
    for token in ("<ms_I>", "<ml_E>", "<mem>"):
        texts = {"prompt": "Hello", "system": "Be brief.", part: f"Say {token}now"}
        arguments = [argument for name, text in texts.items() for argument in (f"--{name}", text)]
        assert_refused(run("generate", checkpoint, *arguments), f"the prompt's text spells the memory token {token}, ")


@needs_tokenizer
def test_rows_of_a_batch_are_answered_as_alone(vismem_pair: Callable[..., VisMemPair]) -> None:
    """Sampled too: what a row draws depends neither on the others nor on what is forced; an image in one row alone."""
    generator = TorchGenerator(vismem_pair("qwen3_vl").model, vismem_pair("qwen3_vl").inputs)
    prompts = [Prompt("A star is a"), Prompt("What is it?", (Image.new("RGB", (96, 64), (9, 99, 9)),))]
    for sampling in (Sampling(), Sampling(1.2, top_k=40, seed=5)):
        both = generator.generate(prompts, 8, sampling, memory="always", max_invocations=2)
        first, _ = both
        (alone,) = generator.generate(prompts[:1], 8, sampling, memory="always", max_invocations=2)
        assert first.token_ids == alone.token_ids
        assert [(each.token, each.kind) for each in first.invocations] == [(0, "long")] + [
            (each.token, each.kind) for each in alone.invocations[1:]
        ]
        assert all(each.seconds > 0 for answer in both for each in answer.invocations)


@needs_tokenizer
def test_what_is_forced_is_not_drawn(vismem_pair: Callable[..., VisMemPair], monkeypatch: pytest.MonkeyPatch) -> None:
    """One draw for each token that the caller sees, and for each invocation."""
    draws: list[float] = []
    draw = surgeon.generation._draw
    monkeypatch.setattr(surgeon.generation, "_draw", lambda *arguments: draws.append(arguments[2]) or draw(*arguments))
    generator = TorchGenerator(vismem_pair("qwen3_vl").model, vismem_pair("qwen3_vl").inputs)
    (answer,) = generator.generate(
        [Prompt("A star is a")], 8, Sampling(1.2, seed=5), memory="always", max_invocations=1
    )
    assert len(answer.invocations) == 1 and len(answer.token_ids) == 8 and len(draws) == 9
