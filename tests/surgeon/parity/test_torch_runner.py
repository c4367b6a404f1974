"""A checkpoint as one side of a comparison: greedy, as long as it is asked to, whatever its files say of sampling."""

import json
from pathlib import Path

import numpy as np
import pytest

from checkpoints import tiny_checkpoint
from surgeon.inputs import Prompt
from surgeon.parity.runner import Trace
from surgeon.parity.torch_runner import TorchRunner

STEPS = 6
PROMPTS = (Prompt("Hello!"), Prompt("What can you do today?"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("candidate") / "source", "qwen3_vl", num_hidden_layers=1)


def trace(checkpoint: Path, **generation: object) -> Trace:
    path = checkpoint / "generation_config.json"
    before = path.read_text() if path.is_file() else None
    try:
        path.write_text(json.dumps(generation))
        return TorchRunner(checkpoint).trace(PROMPTS, STEPS)
    finally:
        path.unlink() if before is None else path.write_text(before)


def test_generation_settings_change_nothing(checkpoint: Path) -> None:
    plain = trace(checkpoint)
    assert plain.tokens.shape == (len(PROMPTS), STEPS)
    first = [int(row[0]) for row in plain.tokens]
    for settings in (
        {"eos_token_id": first},
        {"suppress_tokens": first},
        {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1},
        {"do_sample": True, "temperature": 50.0, "num_beams": 2},
        {"max_length": 3},
    ):
        other = trace(checkpoint, **settings)
        np.testing.assert_array_equal(other.tokens, plain.tokens, err_msg=str(settings))
        np.testing.assert_array_equal(other.step_logits, plain.step_logits, err_msg=str(settings))
