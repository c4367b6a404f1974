"""Commands are found by their files, and what breaks in one is one line and leaves nothing behind."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import surgeon.patch
from cli import cli
from cli._group import SurgeonGroup
from command import ROOT, entries, run

COMMAND = "import click\n@click.command()\ndef twice(): click.echo(2)\nCOMMAND = twice\n"


def test_a_new_file_is_a_new_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "more_commands").mkdir()
    for name, content in (("__init__", ""), ("_shared", "no = command\n"), ("doubled", COMMAND)):
        (tmp_path / "more_commands" / f"{name}.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    group = SurgeonGroup()
    group.add_package(importlib.import_module("more_commands"))
    assert list(group.commands) == ["twice"]


def test_every_file_is_the_command_of_its_name() -> None:
    files = {path.stem.rstrip("_") for path in (ROOT / "cli").glob("[!_]*.py")}
    assert files == cli.commands.keys() and "import" in files


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("two\nlines"), 3, "error: unexpected RuntimeError: two (run with --debug to see where)"),
        (OSError(28, "No space left on device"), 2, "error: the disk is full"),
    ],
)
def test_what_breaks_half_way_is_one_line_and_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, line: str
) -> None:
    def broken(*_: object) -> None:
        raise raised

    monkeypatch.setattr(surgeon.patch, "write_safetensors", broken)
    result = run("patch", source, tmp_path / "out", "--pass", "pvm:layers=1")
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith(line) and result.stderr.count("\n") == 1
    assert entries(tmp_path) == []
    debugged = run("--debug", "patch", source, tmp_path / "out", "--pass", "pvm:layers=1")
    assert debugged.exit_code == code and "Traceback" in debugged.stderr and "in broken" in debugged.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_behind_the_output_is_one_line() -> None:
    command = [sys.executable, "-m", "cli", "passes"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 2 and "no space is left" in done.stderr and len(done.stderr.splitlines()) == 1
