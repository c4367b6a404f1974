"""The command line as a whole: help, wrong use, a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli import COMMANDS
from command import ROOT, entries, process, run
from surgeon import __version__

PVM = "pvm:layers=1,3,latent=32"


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [(["--help"], "surgeon"), (["patch", "--help"], "surgeon"), (["--version"], "surgeon"), (["passes"], "every:N")],
)
def test_what_needs_no_model_does_not_import_torch(arguments: list[str], printed: str) -> None:
    code = f"import sys, cli; cli.cli({arguments}, standalone_mode=False); sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert printed in done.stdout


def test_version() -> None:
    assert run("--version").stdout == f"surgeon {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_teaches_with_an_example(command: str) -> None:
    assert f"surgeon {command}" in run(command, "--help").stdout.partition("\n")[2]


@pytest.mark.parametrize(
    "arguments",
    [
        ["patch", "{source}", "{out}"],
        ["patch", "{source}", "{out}", "--pass", PVM, "-r", "recipe.yaml"],
        ["patch", "{source}", "--pass", PVM],
        ["patch", "{source}", "{out}", "--pass", PVM, "--weights", "hard"],
        ["export", "{source}", "{out}"],
        ["generate", "{source}", "--prompt", "x", "--top-p", "0.5"],
        ["generate", "{source}", "--prompt", "x", "--temperature", "-1"],
        ["patched"],
    ],
)
def test_wrong_use_is_one_line_that_says_where_help_is(source: Path, tmp_path: Path, arguments: list[str]) -> None:
    result = run(*(a.format(source=source, out=tmp_path / "out") for a in arguments))
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    command = arguments[0] if arguments[0] in COMMANDS else ""
    assert line.startswith("error: ") and line.endswith(f"(see `{' '.join(('cli', command)).strip()} --help`)"), line
    assert entries(tmp_path) == []


def test_what_is_missing_or_misspelt_is_said_with_what_to_write(source: Path, tmp_path: Path) -> None:
    for more, message in (
        ((), "`surgeon passes` lists them"),
        (("--pass", PVM, "-r", "recipe.yaml"), "exclude each other"),
        (("--pass", "pvm:layer=1"), "unknown option 'layer'; did you mean 'layers'?"),
        (("--pass", "pvn:layers=1"), "unknown pass 'pvn'; did you mean 'pvm'?"),
    ):
        result = run("patch", source, tmp_path / "out", *more)
        assert result.exit_code == 2 and message in " ".join(result.stderr.split()), result.output


def test_a_directory_that_does_not_exist_in_a_process(tmp_path: Path) -> None:
    done = process("patch", "./nowhere", "out", "--pass", PVM, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no such directory: nowhere\n"
    assert entries(tmp_path) == []


def test_debug_shows_the_traceback_of_a_refusal_in_a_process(tmp_path: Path) -> None:
    done = process("--debug", "inspect", tmp_path)
    assert done.returncode == 2 and "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and "is not a checkpoint" in done.stderr
