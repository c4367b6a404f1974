"""The command line in tests: run it, and see what it did."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from cli import cli

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: object) -> Result:
    """The command, in this process."""
    return CliRunner().invoke(cli, list(map(str, arguments)))


def process(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command, as a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False, **options)


def entries(directory: Path) -> list[tuple[str, int]]:
    return sorted((str(p.relative_to(directory)), p.stat().st_mtime_ns) for p in directory.rglob("*"))


def assert_refused(result: Result, *expected: str, code: int = 2) -> None:
    """Exit code and one line on stderr that holds `expected`; no traceback, nothing on stdout."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert all(part in line for part in expected), line
