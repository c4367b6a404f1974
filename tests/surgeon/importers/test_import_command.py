"""`surgeon import`: what it prints where, and its exit codes."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

import command
import surgeon.importers._tensors
from published import golden_checkpoint


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

    again = run(source, tmp_path / "out", "--overwrite", "--json")
    found = json.loads(again.stdout)
    assert (found["model_type"], found["grafts"], found["image_token_id"]) == ("surgeon_internvl", {"mixin": [3]}, 593)
    assert len(found["warnings"]) == 1


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
