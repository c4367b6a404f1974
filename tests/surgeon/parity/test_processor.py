"""Prompts against transformers' own processor, which no part of this tool has a hand in."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor

from checkpoints import has_tokenizer, tiny_checkpoint
from exporters.validation.validate import validate_pair
from patching import apply
from surgeon.families._base import Family
from surgeon.inputs import Inputs
from surgeon.parity.cases import default_cases, own_case
from surgeon.parity.processor import ProcessorUnavailable, check_inputs

pytestmark = [
    pytest.mark.skipif(not has_tokenizer(), reason="needs the demo checkpoint's tokenizer"),
    pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not there"),
]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "source", "qwen3_vl", num_hidden_layers=1)


def longer_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    render = Inputs.render
    monkeypatch.setattr(Inputs, "render", lambda *a, **k: render(*a, **k) + " ")


def another_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    render = Inputs.render
    monkeypatch.setattr(Inputs, "render", lambda *a, **k: render(*a, **k).replace("picture", "Picture"))


def brighter_image(monkeypatch: pytest.MonkeyPatch) -> None:
    process_image = Inputs.process_image

    def brighter(*arguments: Any, **keywords: Any) -> Any:
        pixels, grid = process_image(*arguments, **keywords)
        return pixels + 1e-3, grid

    monkeypatch.setattr(Inputs, "process_image", brighter)


def more_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Family, "expand_placeholder", lambda self, config, grid, tokenizer: "<|image_pad|>" * 3)
    monkeypatch.setattr("surgeon.families._qwen_vl.QwenVLFamily.image_tokens", lambda *a: 3)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (longer_prompt, "one image: input_ids is [1, 26], transformers' processor gives [1, 25]"),
        (another_letter, "input_ids"),
        (brighter_image, "one image: pixel_values is not what transformers' processor gives"),
        (more_tokens, "input_ids"),
    ],
)
def test_a_wrong_prompt_is_seen(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, fault: Any, message: str) -> None:
    fault(monkeypatch)
    _, failures = check_inputs(Inputs.from_directory(checkpoint), checkpoint, default_cases())
    assert message in failures[0]


def test_a_prompt_that_is_wrong_on_both_sides_alike_fails_a_comparison(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply(checkpoint, tmp_path / "patched", "pvm:layers=0,latent=32")
    assert validate_pair(checkpoint, tmp_path / "patched", prompt="Hello!", steps=1).passed
    longer_prompt(monkeypatch)
    report = validate_pair(checkpoint, tmp_path / "patched", prompt="Hello!", steps=1)
    assert report.comparisons[0].passed and report.verdict == "failed"
    (inputs,) = [check for check in report.checks if check.name == "inputs"]
    assert inputs.failures[0].startswith("yours: input_ids is [1, ")


def test_where_it_cannot_be_made_that_is_said(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ImportError("Qwen3VLVideoProcessor requires the Torchvision library but it was not found")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", refuse)
    cases = own_case([], "Hello!")
    with pytest.raises(ProcessorUnavailable, match="ImportError: Qwen3VLVideoProcessor requires"):
        check_inputs(Inputs.from_directory(checkpoint), checkpoint, cases)
    report = validate_pair(checkpoint, checkpoint, prompt="Hello!", steps=1)
    assert report.passed and not [check for check in report.checks if check.name == "inputs"]
    assert any("not compared with transformers' own processor: ImportError" in note for note in report.notes)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchvision" else find_spec(name))
    with pytest.raises(ProcessorUnavailable, match="torchvision is not installed"):
        check_inputs(Inputs.from_directory(checkpoint), checkpoint, cases)
