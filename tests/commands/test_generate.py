"""`surgeon generate` answers as transformers does, and refuses what is no image."""

import json
from pathlib import Path

import pytest
from PIL import Image

from checkpoints import DEMO, has_tokenizer
from command import assert_refused, process, run
from surgeon import models
from surgeon.generation import Sampling
from surgeon.inputs import Prompt
from surgeon.torch_generate import TorchGenerator


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
