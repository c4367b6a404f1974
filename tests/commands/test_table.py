"""The table of commands and their files; what breaks in one is one line and leaves nothing behind."""

import subprocess
import sys
from pathlib import Path

import click
import pytest

import surgeon.patched_weights
from cli import COMMANDS, cli, module_of
from command import ROOT, entries, run


def test_every_file_is_the_command_of_its_name() -> None:
    files = {path.stem for path in (ROOT / "commands").glob("[!_]*.py")}
    assert files == {module_of(name) for name in COMMANDS} and "import_" in files


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_says_what_the_command_says_first(name: str) -> None:
    """A line that fits 80 columns whole, so that the list is read without loading a command."""
    command = cli.get_command(click.Context(cli), name)
    assert command is not None and command.name == name
    assert str(command.help).split("\n\n")[0] == COMMANDS[name]
    assert len(COMMANDS[name]) <= 80 - len("  autotune  ")


def test_the_list_is_whole_and_in_the_order_of_a_session() -> None:
    shown = run("--help").stdout.partition("Commands:\n")[2].splitlines()
    assert [tuple(line.split(None, 1)) for line in shown] == list(COMMANDS.items())
    order = ["inspect", "import", "patch", "validate", "export", "engine", "generate", "bench", "autotune", "doctor"]
    assert [name for name in COMMANDS if name != "passes"] == order


def test_help_loads_no_command() -> None:
    code = "import sys, cli; cli.cli(['--help'], standalone_mode=False); print([m for m in sys.modules if 'comm' in m])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("\n[]\n"), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("two\nlines"), 3, "error: unexpected RuntimeError: two (run with --debug to see where)"),
        (AssertionError(), 3, "error: unexpected AssertionError (run"),
        (OSError(28, "No space left on device"), 2, "error: the disk is full"),
    ],
)
def test_what_breaks_half_way_is_one_line_and_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, line: str
) -> None:
    def broken(*_: object) -> None:
        raise raised

    monkeypatch.setattr(surgeon.patched_weights, "write_safetensors", broken)
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
