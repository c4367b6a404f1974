"""Tokenizers in all the files that they come in, extended; and those that do not become what they were to be."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import surgeon.vocabulary
from checkpoints import tiny_checkpoint
from patching import apply
from surgeon.checkpoint.reader import Checkpoint
from surgeon.errors import CheckpointError, SurgeonError
from surgeon.tokenizer_check import check_extended
from surgeon.vocabulary import Vocabulary

TOKENS = ("<a>", "<b c>", "<漢字>")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("vocabulary") / "source", "qwen2_5_vl")


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    change(content)
    path.write_text(json.dumps(content))


def added(directory: Path) -> dict[str, int]:
    content = json.loads((directory / "tokenizer.json").read_text())
    return {entry["content"]: entry["id"] for entry in content["added_tokens"]}


def with_decoder(directory: Path) -> None:
    """As transformers 4 saved tokenizers."""
    entries = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
    decoder = {str(entry.pop("id")): entry for entry in entries}
    edit(directory / "tokenizer_config.json", lambda c: c.update(added_tokens_decoder=decoder))


def with_added_tokens(directory: Path) -> None:
    """As they were published before that, and the other files still are."""
    with_decoder(directory)
    edit(directory / "added_tokens.json", lambda c: c.update(added(directory)))
    edit(directory / "special_tokens_map.json", lambda c: c.update(additional_special_tokens=["<|im_start|>"]))


def without_backend(directory: Path) -> None:
    """vocab.json and merges.txt alone."""
    content = json.loads((directory / "tokenizer.json").read_text())
    (directory / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]]
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n")


def vocab_and_decoder(directory: Path) -> None:
    with_decoder(directory)
    without_backend(directory)
    (directory / "tokenizer.json").unlink()


def vocab_and_added_tokens(directory: Path) -> None:
    """With special tokens in a file of their own."""
    without_backend(directory)
    tokens = added(directory)
    edit(directory / "added_tokens.json", lambda c: c.update(tokens))
    edit(directory / "special_tokens_map.json", lambda c: c.update(eos_token="<|im_end|>"))
    edit(directory / "tokenizer_config.json", lambda c: c.update(extra_special_tokens=list(tokens)))
    (directory / "tokenizer.json").unlink()


def vocab_alone(directory: Path) -> None:
    without_backend(directory)
    (directory / "tokenizer.json").unlink()


@pytest.mark.parametrize("layout", [with_decoder, with_added_tokens, vocab_and_decoder, vocab_and_added_tokens])
def test_every_layout_is_extended(source: Path, tmp_path: Path, layout: Callable[[Path], None]) -> None:
    directory = Path(shutil.copytree(source, tmp_path / "source"))
    layout(directory)
    apply(directory, tmp_path / "out", f"memory-tokens:tokens={','.join(TOKENS)}")
    before, after = (AutoTokenizer.from_pretrained(path) for path in (directory, tmp_path / "out"))
    ids = {token: len(before) + number for number, token in enumerate(TOKENS)}
    check_extended(before, after, ids)  # of what was published
    assert set(file.name for file in (tmp_path / "out").iterdir()) >= {file.name for file in directory.glob("*.json")}


def test_a_vocabulary_without_a_list_of_added_tokens_gets_one(source: Path, tmp_path: Path) -> None:
    """The ids of this one's other special tokens go to new ones, which the pass refuses: the config names them."""
    directory = Path(shutil.copytree(source, tmp_path / "source"))
    vocab_alone(directory)
    with Checkpoint.open(directory) as checkpoint:
        vocabulary = Vocabulary(checkpoint)
        before = len(vocabulary.tokenizer)
        assert list(vocabulary.extended(TOKENS).values()) == [before, before + 1, before + 2]
    with pytest.raises(SurgeonError, match="'<a>' would get the id 615, which is eos_token_id"):
        apply(directory, tmp_path / "out", f"memory-tokens:tokens={','.join(TOKENS)}")


@pytest.mark.parametrize("special_map", [False, True])
def test_a_sentencepiece_model_alone_is_extended(source: Path, tmp_path: Path, special_map: bool) -> None:
    pytest.importorskip("sentencepiece")
    from sentencepiece_models import sentencepiece_model

    directory = Path(shutil.copytree(source, tmp_path / "source", ignore=shutil.ignore_patterns("tokenizer*")))
    (directory / "tokenizer.model").write_bytes(sentencepiece_model("llama"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    edit(directory / "tokenizer_config.json", lambda c: c.update(tokenizer_class="LlamaTokenizer", **named))
    if special_map:
        edit(directory / "special_tokens_map.json", lambda c: c.update(named))
    with Checkpoint.open(directory) as checkpoint:
        vocabulary = Vocabulary(checkpoint)
        assert vocabulary.extended(TOKENS) == {token: 500 + number for number, token in enumerate(TOKENS)}
        assert vocabulary.token_id("\n") is None and vocabulary.token_id(".") is not None


def test_ids_are_those_that_transformers_gives(source: Path) -> None:
    with Checkpoint.open(source) as checkpoint:
        vocabulary = Vocabulary(checkpoint)
        ids = vocabulary.extended(TOKENS)
        assert len(vocabulary.tokenizer) == 639  # it is tried in a copy
        assert vocabulary.spans() == ((0, 639),)
        assert vocabulary.token_id("\n") is not None and vocabulary.token_id("a b c d") is None
        tokenizer = AutoTokenizer.from_pretrained(source)
        tokenizer.add_tokens(list(TOKENS), special_tokens=True)
        assert ids == {token: tokenizer.convert_tokens_to_ids(token) for token in TOKENS}


def test_a_token_that_no_decoder_gives_back_is_refused(source: Path, tmp_path: Path) -> None:
    """A byte-level tokenizer stores bytes as letters, and takes this one for a byte."""
    with pytest.raises(SurgeonError, match="the id of '<é>' is decoded as .* then; name the token in ASCII"):
        apply(source, tmp_path / "out", "memory-tokens:tokens=<a>,<é>")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"special": False}, "is not hidden by skip_special_tokens"),
        ({"single_word": True}, "is not one token"),
        ({"content": "<q>"}, "has the id None then, where 639 is to be|has the id"),
    ],
)
def test_an_extended_tokenizer_that_is_wrong_is_noticed(
    source: Path, tmp_path: Path, flags: dict[str, Any], message: str
) -> None:
    directory = Path(shutil.copytree(source, tmp_path / "source"))
    entry = {"id": 639, "content": "<a>", "special": True, "single_word": False, "lstrip": False, "rstrip": False}
    edit(directory / "tokenizer.json", lambda c: c["added_tokens"].append({**entry, "normalized": False, **flags}))
    before, after = (AutoTokenizer.from_pretrained(path) for path in (source, directory))
    with pytest.raises(CheckpointError, match=message):
        check_extended(before, after, {"<a>": 639})


def test_other_text_that_is_split_differently_is_noticed(source: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(source, tmp_path / "source"))
    entry = {"id": 639, "content": "<a>", "special": True, "single_word": False, "lstrip": False, "rstrip": False}
    edit(directory / "tokenizer.json", lambda c: c["added_tokens"].append({**entry, "normalized": False}))
    edit(directory / "tokenizer.json", lambda c: c["model"]["merges"].reverse())
    before, after = (AutoTokenizer.from_pretrained(path) for path in (source, directory))
    with pytest.raises(CheckpointError, match="splits other text differently then, such as"):
        check_extended(before, after, {"<a>": 639})


def test_a_tokenizer_that_fails_the_check_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the plan already; and, should the staged files be others, before a weight is copied."""
    extend = surgeon.vocabulary.extend_tokenizer_files
    weights: list[object] = []
    monkeypatch.setattr("surgeon.patch.write_source_weights", lambda *args: weights.append(args))
    for spoilt in (str(tmp_path), "surgeon-tokenizer-"):

        def spoil(directory: Path, *arguments: Any, where: str = spoilt) -> int:
            count = extend(directory, *arguments)
            if where in str(directory):
                edit(directory / "tokenizer.json", lambda c: c["added_tokens"].pop())
            return count

        monkeypatch.setattr(surgeon.vocabulary, "extend_tokenizer_files", spoil)
        with pytest.raises(SurgeonError, match="it has 643 tokens then, where 639 and 5 new ones are to be"):
            apply(source, tmp_path / "out", "memory-tokens")
        assert not list(tmp_path.iterdir()) and not weights
