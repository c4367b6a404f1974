"""What killed runs leave is seen to by the next run of the same target, and what is in use is left alone."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from surgeon.checkpoint import rename
from surgeon.checkpoint.publish import staged, staged_file
from surgeon.errors import TargetError
from surgeon.leftovers import recover

ROOT = Path(__file__).parents[2]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


STAGING = """
import os, signal, sys, time
from pathlib import Path
from surgeon.checkpoint import rename
from surgeon.checkpoint.publish import staged, staged_file
with {call} as staging:
    {write}
    print("ready", flush=True)
    time.sleep(60)
"""


@contextmanager
def at_work(call: str, write: str) -> Iterator[subprocess.Popen[str]]:
    """Another process in the middle of `call`, which is killed at the end."""
    script = STAGING.format(call=call, write=write)
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.send_signal(signal.SIGKILL)


def test_what_a_killed_process_left_is_removed_by_the_next_run(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with at_work(f"staged(Path({str(target)!r}))", "(staging / 'part').touch()"):
        pass
    (left,) = names(tmp_path)
    assert left.startswith(".out.staging-")
    (tmp_path / ".other.staging-0123abcd").mkdir()  # another target's
    (tmp_path / ".out.staging-of-mine").mkdir()  # not of this tool
    with staged(target) as staging:
        assert names(tmp_path) == sorted([".other.staging-0123abcd", ".out.staging-of-mine", staging.name])
        (staging / "whole").touch()
    assert names(tmp_path) == [".other.staging-0123abcd", ".out.staging-of-mine", "out"]
    assert names(target) == ["whole"]


def test_what_a_killed_process_left_of_a_file_is_removed(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    with at_work(f"staged_file(Path({str(target)!r}))", "staging.write_text('1')"):
        pass
    assert len(names(tmp_path)) == 1
    (tmp_path / ".report.staging-0123abcd.json").touch()  # as earlier versions named them
    with staged_file(target) as file:
        file.write_text("2")
    assert names(tmp_path) == ["report.json"]


def test_what_another_process_is_writing_stays(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with at_work(f"staged(Path({str(target)!r}))", "(staging / 'part').touch()"):
        (theirs,) = names(tmp_path)
        with staged(target) as staging:
            (staging / "whole").touch()
        assert names(tmp_path) == [theirs, "out"]
        assert names(tmp_path / theirs) == ["part"]
    with pytest.raises(TargetError, match="exists"), staged(target):
        pytest.fail("entered")
    assert names(tmp_path) == ["out"]  # a run that is refused cleans up too


KILLED_BETWEEN_RENAMES = """
import os, signal, sys
from pathlib import Path
from surgeon.checkpoint import rename
from surgeon.checkpoint.publish import staged
rename._function = lambda: None  # as on a system without renameat2
plain = os.rename
def once(source, to):
    plain(source, to)
    os.kill(os.getpid(), signal.SIGKILL)
os.rename = once
with staged(Path(sys.argv[1]), overwrite=True) as staging:
    (staging / "new").touch()
"""


def killed_between_renames(target: Path) -> None:
    """An overwrite of two renames whose process was killed after the first of them."""
    target.mkdir()
    (target / "old").touch()
    killed = subprocess.run([sys.executable, "-c", KILLED_BETWEEN_RENAMES, str(target)], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not target.exists() and len(names(target.parent)) == 2


def test_the_only_copy_that_a_killed_process_left_is_put_back(tmp_path: Path) -> None:
    target = tmp_path / "out"
    killed_between_renames(target)
    with pytest.warns(UserWarning, match="was put back"), pytest.raises(TargetError, match="exists"), staged(target):
        pytest.fail("entered")
    assert names(tmp_path) == ["out"]
    assert names(target) == ["old"]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_two_copies_the_one_set_aside_last_is_put_back(tmp_path: Path, order: tuple[int, int]) -> None:
    """Runs were killed one after the other; the names of what they left say nothing of the order."""
    for number in order:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / str(number)).touch()
        (tmp_path / "out").rename(tmp_path / f".out.old-{number:08x}")
        time.sleep(0.05)  # a file system's clock ticks in milliseconds
    with pytest.warns(UserWarning, match="was put back"):
        recover(tmp_path / "out")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == [str(order[-1])]


def test_an_overwrite_after_a_killed_one(tmp_path: Path) -> None:
    target = tmp_path / "out"
    killed_between_renames(target)
    with pytest.warns(UserWarning, match="was put back"), staged(target, overwrite=True) as staging:
        assert names(target) == ["old"]
        (staging / "newer").touch()
    assert names(tmp_path) == ["out"]
    assert names(target) == ["newer"]


def test_another_process_does_not_put_back_what_is_being_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two renames there is nothing but `.old-*`, which is not what a killed run left."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()
    monkeypatch.setattr(rename, "_function", lambda: None)  # as on a system without renameat2
    plain = os.rename
    other = "from surgeon.leftovers import recover; from pathlib import Path; recover(Path({!r}))"

    def watched(source: Any, to: Any) -> None:
        plain(source, to)
        subprocess.run([sys.executable, "-c", other.format(str(target))], cwd=ROOT, check=True)

    monkeypatch.setattr(os, "rename", watched)
    with staged(target, overwrite=True) as staging:
        (staging / "new").touch()
    assert names(tmp_path) == ["out"]
    assert names(target) == ["new"]


def test_killed_after_the_exchange_the_new_one_is_there(tmp_path: Path) -> None:
    """What it replaced is then a leftover, and goes with the next run."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()
    script = """
import os, signal, sys
from pathlib import Path
from surgeon.checkpoint import publish
publish.remove = lambda path: os.kill(os.getpid(), signal.SIGKILL)
with publish.staged(Path(sys.argv[1]), overwrite=True) as staging:
    (staging / "new").touch()
"""
    killed = subprocess.run([sys.executable, "-c", script, str(target)], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert names(target) == ["new"] and len(names(tmp_path)) == 2
    with staged(target, overwrite=True) as staging:
        (staging / "newer").touch()
    assert names(tmp_path) == ["out"] and names(target) == ["newer"]
