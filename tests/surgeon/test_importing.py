"""`surgeon import`: what it prints where, and its exit codes."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

import command
import surgeon.importers._tensors
import surgeon.importing
from published import golden_checkpoint
from surgeon.errors import CheckpointError, TargetError
from surgeon.importing import import_checkpoint


def run(*arguments: object) -> Result:
    return command.run("import", *arguments)


def test_says_what_it_made_and_warns_on_stderr(tmp_path: Path) -> None:
    source = golden_checkpoint(tmp_path / "source", "comemo")
    done = run(source, tmp_path / "out", "--image-token-id", 500)
    assert done.exit_code == 0
    assert "surgeon_internvl (internlm2 inside)" in done.stdout and "329,058 parameters" in done.stdout
    assert "grafted mixin at layers 3" in done.stdout
    (warning,) = done.stderr.splitlines()
    assert warning.startswith("warning: ") and "no tokenizer" in warning
    assert json.loads((tmp_path / "out" / "config.json").read_text())["image_token_id"] == 500

    again = run(source, tmp_path / "out", "--overwrite", "--json")
    report = json.loads(again.stdout)
    assert (report["model_type"], report["image_token_id"]) == ("surgeon_internvl", 593)
    assert report["grafts"] == {"mixin": [3]}
    assert len(report["warnings"]) == 1
    assert report["bytes_written"] == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda c: c["llm_config"].update(model_type="gemma"), ("gemma", "internlm2")),
        (lambda c: c.update(model_type="qwen3_vl"), ("no importer", "transformers' own")),
    ],
)
def test_refusals_are_one_line(tmp_path: Path, change: Any, parts: tuple[str, ...]) -> None:
    done = run(golden_checkpoint(tmp_path / "source", change=change), tmp_path / "out")
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and all(part in line for part in parts)


def test_a_failure_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = golden_checkpoint(tmp_path / "in" / "source")
    calls: list[str] = []
    read = surgeon.importers._tensors.Checkpoint.read

    def failing(checkpoint: Any, name: str) -> Any:
        calls.append(name)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return read(checkpoint, name)

    monkeypatch.setattr(surgeon.importers._tensors.Checkpoint, "read", failing)
    done = run(source, tmp_path / "out")
    assert done.exit_code == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_source_that_is_cut_short_while_it_is_read_leaves_nothing(tmp_path: Path) -> None:
    """Its tensors are mapped, so that what is missing would end the process."""
    source = golden_checkpoint(tmp_path / "source", "comemo")
    weights = source / "model.safetensors"
    half = weights.stat().st_size // 2

    def cut(stage: str, done: int, total: int) -> None:
        os.truncate(weights, half)

    with pytest.raises(CheckpointError, match=f"{weights}: cut short while it was read: .* the file at {half}"):
        import_checkpoint(source, tmp_path / "out", image_token_id=500, progress=cut)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_source_that_is_written_to_while_it_is_read_leaves_nothing(tmp_path: Path) -> None:
    source = golden_checkpoint(tmp_path / "source", "comemo")
    weights = source / "model.safetensors"

    def write(stage: str, done: int, total: int) -> None:
        with open(weights, "r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"abcd")

    with pytest.raises(TargetError, match=f"{weights} changed while it was read, though not in size"):
        import_checkpoint(source, tmp_path / "out", image_token_id=500, progress=write)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_was_staged_is_read_before_it_is_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = golden_checkpoint(tmp_path / "source", "comemo")
    write = surgeon.importing.write_tensors

    def cut_after(checkpoint: Any, planned: Any, directory: Path, progress: Any) -> int:
        written = write(checkpoint, planned, directory, progress)
        os.truncate(directory / "model.safetensors", written // 2)
        return written

    monkeypatch.setattr(surgeon.importing, "write_tensors", cut_after)
    with pytest.raises(TargetError, match=r"out was not written, because .*out/model.safetensors: truncated"):
        import_checkpoint(source, tmp_path / "out", image_token_id=500)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
