"""A source beside the same with added tokens: what must hold, and that a planted fault is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import tiny_checkpoint
from exporters.export import export_bundle
from exporters.onnx.manifest import Manifest
from exporters.validation.validate import validate_bytes, validate_pair
from patching import apply
from surgeon.parity.report import Report

STEPS = 4
HEAD, EMBEDDINGS = "lm_head.weight", "model.language_model.embed_tokens.weight"
Change = Callable[[dict[str, torch.Tensor]], Any]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("validate")
    options: dict[str, Any] = {"spare": {}, "grown": {"vocab_size": 641}}
    return {name: tiny_checkpoint(folder / name, "qwen3_vl", **each) for name, each in options.items()}


def spoil(directory: Path, change: Change) -> None:
    file = directory / "model-base.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def failures(report: Report) -> str:
    return "\n".join(failure for check in report.checks for failure in check.failures)


@pytest.mark.parametrize("which", ["spare", "grown"])
@pytest.mark.parametrize("passes", [("memory-tokens",), ("memory-tokens", "pvm:layers=1,latent=32")])
def test_the_source_is_in_it(sources: dict[str, Path], tmp_path: Path, which: str, passes: tuple[str, ...]) -> None:
    apply(sources[which], tmp_path / "out", *passes)
    report = validate_pair(tmp_path / "out", sources[which], steps=STEPS, bytes_too=True)
    assert report.verdict == "passed", failures(report)
    assert report.reference == str(sources[which])
    assert {check.name for check in report.checks} >= {"bytes", "settings", "record", "weights"}
    (comparison,) = report.comparisons
    assert comparison.level.bit_equal and all(case.prefill.equal and case.decode.equal for case in comparison.cases)


@pytest.mark.parametrize("which", ["spare", "grown"])
@pytest.mark.parametrize(
    ("change", "check", "message"),
    [
        (lambda t: t[HEAD][17].neg_(), "weights", HEAD),
        (lambda t: t[EMBEDDINGS][638].neg_(), "weights", EMBEDDINGS),
        (lambda t: t[EMBEDDINGS][642].mul_(1.01), "record", f"row 642 of {EMBEDDINGS}, of the token '<ml_E>', is not"),
        (lambda t: t[HEAD][642].copy_(t[EMBEDDINGS][642]),
         "record", f"row 642 of {HEAD}, of the token '<ml_E>', is not"),
    ],
    ids=["a row of the head", "a row of the embeddings", "a new row", "the embedding's row in the head"],
)  # fmt: skip
def test_a_fault_is_named(
    sources: dict[str, Path], tmp_path: Path, which: str, change: Change, check: str, message: str
) -> None:
    apply(sources[which], tmp_path / "out", "memory-tokens")
    spoil(tmp_path / "out", change)
    report = validate_pair(sources[which], tmp_path / "out", steps=1)
    assert report.verdict == "failed" and message in failures(report)
    assert [each.name for each in report.checks if each.failures] == [check]
    if check == "record":  # trained rows are no fault where that is said
        assert validate_pair(sources[which], tmp_path / "out", steps=1, grafts_tuned=True).verdict == "passed"
        assert validate_bytes(sources[which], tmp_path / "out").passed
    else:
        assert not validate_bytes(sources[which], tmp_path / "out").passed


def test_a_new_token_that_leads_is_named(sources: dict[str, Path], tmp_path: Path) -> None:
    apply(sources["grown"], tmp_path / "out", "memory-tokens")
    # whatever the hidden state, one of the two is large
    spoil(tmp_path / "out", lambda t: [t[HEAD][row].copy_(t[HEAD][9] * by) for row, by in ((642, 1e3), (643, -1e3))])
    report = validate_pair(sources["grown"], tmp_path / "out", steps=1)
    text = [failure for comparison in report.comparisons for case in comparison.cases for failure in case.failures]
    assert any("one of the added tokens is the likeliest at" in each for each in text)
    tuned = validate_pair(sources["grown"], tmp_path / "out", steps=1, grafts_tuned=True)
    assert tuned.verdict == "passed" and any("is the likeliest" in note for note in tuned.all_notes())


def test_a_record_of_other_tokens_is_named(sources: dict[str, Path], tmp_path: Path) -> None:
    apply(sources["spare"], tmp_path / "out", "memory-tokens")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["surgeon"]["tokens"]["<mem>"] = 700
    path.write_text(json.dumps(config))
    report = validate_pair(sources["spare"], tmp_path / "out", steps=1)
    assert report.verdict == "failed"
    assert "surgeon.tokens.<mem> is 700" in failures(report) and "tokenizers are not the same" in failures(report)


@pytest.mark.parametrize("which", ["spare", "grown"])
def test_a_bundle_has_the_tokens(sources: dict[str, Path], tmp_path: Path, which: str) -> None:
    apply(sources[which], tmp_path / "out", "memory-tokens")
    export_bundle(tmp_path / "out", tmp_path / "bundle", dtype=torch.float32, max_length=256)
    rows = {"spare": 2048, "grown": 644}[which]
    assert Manifest.read(tmp_path / "bundle").sizes.vocab_size == rows
    assert "<ms_I>" in (tmp_path / "bundle" / "processor" / "tokenizer.json").read_text()
    for reference in (sources[which], tmp_path / "out"):
        assert validate_pair(reference, tmp_path / "bundle", steps=2).verdict == "passed"
    assert "`added tokens`: <ms" in (tmp_path / "bundle" / "README.md").read_text().replace("\\", "")
