"""What fails while cleaning up never hides the first error."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from checkpoints import tiny_checkpoint
from command import assert_refused, run
from surgeon.cleanup import cleaning_up, temporary_directory


def fail() -> None:
    raise OSError("the second")


def test_the_first_error_goes_on_with_a_note_of_the_second() -> None:
    with pytest.raises(KeyError, match="the first") as raised, cleaning_up(fail, "tidy"):
        raise KeyError("the first")
    assert raised.value.__notes__ == ["could not tidy: OSError: the second"]


def test_alone_the_second_is_raised() -> None:
    with pytest.raises(OSError, match="the second"), cleaning_up(fail, "tidy"):
        pass


def test_a_temporary_directory_that_cannot_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with temporary_directory("work-", tmp_path) as folder:
        (folder / "a").touch()
    assert list(tmp_path.iterdir()) == []

    def broken(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EIO, "broken disk")  # 3.13's rmtree rewords one without a number

    with pytest.raises(ZeroDivisionError, match="the first") as raised, temporary_directory("work-", tmp_path):
        monkeypatch.setattr(os, "rmdir", broken)
        raise ZeroDivisionError("the first")
    assert "broken disk" in raised.value.__notes__[0]


def test_the_command_line_says_both_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl")
    (source / "tokenizer_config.json").write_text("{")

    def broken(*args: object, **kwargs: object) -> None:
        raise OSError("broken disk")

    monkeypatch.setattr(shutil, "rmtree", broken)
    done = run("patch", source, tmp_path / "out", "--pass", "pvm:layers=1,latent=32")
    assert_refused(done, "tokenizer_config.json", "is not JSON", "(could not remove", "broken disk)")
