"""Answering with a checkpoint: where an answer ends."""

import json
from pathlib import Path

import pytest

from checkpoints import has_tokenizer, tiny_checkpoint
from surgeon.inputs import Prompt
from surgeon.torch_generate import TorchGenerator

pytestmark = pytest.mark.skipif(not has_tokenizer(), reason="the demo checkpoint is not there")
PROMPT = Prompt("hello there")


def end_with(checkpoint: Path, *token_ids: int) -> None:
    path = checkpoint / "generation_config.json"
    settings = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps(settings | {"eos_token_id": list(token_ids)}))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_every_end_token_of_the_checkpoint_ends_an_answer(place: int, tmp_path: Path) -> None:
    """Published checkpoints have two: the end of a turn, and the end of a text."""
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl")
    whole = TorchGenerator(source).generate([PROMPT], 6)[0]
    assert len(whole.token_ids) == 6 and whole.finish_reason == "length"
    last = whole.token_ids[3]
    never = [token for token in range(2000) if token not in whole.token_ids][:2]
    end_with(source, *never[:place], last, *never[place:])
    ended = TorchGenerator(source).generate([PROMPT], 6)[0]
    assert ended.token_ids == whole.token_ids[: whole.token_ids.index(last) + 1]
    assert ended.finish_reason == "stop"


def test_a_request_for_as_many_tokens_as_it_takes_to_end_ends(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl")
    tokens = TorchGenerator(source).generate([PROMPT], 3)[0].token_ids
    end_with(source, tokens[2])
    assert tokens[2] not in tokens[:2]
    assert TorchGenerator(source).generate([PROMPT], 3)[0].finish_reason == "stop"
    assert TorchGenerator(source).generate([PROMPT], 2)[0].finish_reason == "length"


def test_nothing_of_the_checkpoint_but_its_end_tokens_changes_an_answer(tmp_path: Path) -> None:
    """As of a bundle, which has nothing to obey the rest."""
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl")
    tokens = TorchGenerator(source).generate([PROMPT], 4)[0].token_ids
    path = source / "generation_config.json"
    settings = json.loads(path.read_text())
    path.unlink()
    unseen = {"suppress_tokens": tokens, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "min_new_tokens": 3}
    path.write_text(json.dumps(settings | unseen))
    assert TorchGenerator(source).generate([PROMPT], 4)[0].token_ids == tokens
