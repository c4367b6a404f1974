import errno
import fcntl
import os
from pathlib import Path
from typing import Any, Literal

import pytest

from surgeon.checkpoint import share
from surgeon.checkpoint.share import Shared, share_file
from surgeon.errors import CheckpointError

CONTENT = bytes(range(256)) * 5000


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A link, as in the Hugging Face cache."""
    (tmp_path / "blob").write_bytes(CONTENT)
    (tmp_path / "model.safetensors").symlink_to("blob")
    return tmp_path / "model.safetensors"


@pytest.fixture
def no_reflink(monkeypatch: pytest.MonkeyPatch) -> None:
    def ioctl(*args: Any) -> int:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(fcntl, "ioctl", ioctl)


@pytest.fixture
def reflink(monkeypatch: pytest.MonkeyPatch) -> None:
    def ioctl(target: int, request: int, source: int) -> int:
        assert request == 0x40049409
        os.write(target, os.pread(source, len(CONTENT), 0))
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)


@pytest.mark.parametrize("mode", ["auto", "link"])
@pytest.mark.usefixtures("reflink")
def test_reflink_where_the_file_system_can(source: Path, tmp_path: Path, mode: Literal["auto", "link"]) -> None:
    assert share_file(source, tmp_path / "out", mode) == Shared("reflink", 0)
    assert (tmp_path / "out").read_bytes() == CONTENT


@pytest.mark.usefixtures("reflink")
def test_copy_never_reflinks(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert share_file(source, tmp_path / "out", "copy") == Shared("copy", len(CONTENT))


@pytest.mark.usefixtures("no_reflink")
def test_link_resolves_symlinks_first(source: Path, tmp_path: Path) -> None:
    assert share_file(source, tmp_path / "out", "link") == Shared("hardlink", 0)
    assert not (tmp_path / "out").is_symlink()
    assert (tmp_path / "out").samefile(tmp_path / "blob")


@pytest.mark.usefixtures("no_reflink")
def test_auto_copies_so_that_a_later_write_stays_apart(source: Path, tmp_path: Path) -> None:
    counts: list[int] = []
    assert share_file(source, tmp_path / "out", "auto", counts.append) == Shared("copy", len(CONTENT))
    assert sum(counts) == len(CONTENT)
    with open(tmp_path / "out", "r+b") as file:
        file.write(b"changed")
    assert (tmp_path / "blob").read_bytes() == CONTENT


@pytest.mark.usefixtures("no_reflink")
def test_link_on_another_file_system_is_a_copy(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*args: Any) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", link)
    assert share_file(source, tmp_path / "out", "link").method == "copy"
    assert (tmp_path / "out").read_bytes() == CONTENT


@pytest.mark.parametrize("answer", [0, errno.EXDEV])
def test_copy_without_help_of_the_kernel(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: int
) -> None:
    def copy_file_range(*args: Any) -> int:
        if answer:
            raise OSError(answer, "not here")
        return 0

    monkeypatch.setattr(os, "copy_file_range", copy_file_range)
    counts: list[int] = []
    assert share_file(source, tmp_path / "out", "copy", counts.append) == Shared("copy", len(CONTENT))
    assert (tmp_path / "out").read_bytes() == CONTENT
    assert sum(counts) == len(CONTENT)


def test_a_failed_copy_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OSError, match="No space left"):
        share_file(source, tmp_path / "out", "copy")
    assert not (tmp_path / "out").exists()


def test_a_source_that_shrinks_is_an_error(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shrink(*args: Any) -> int:
        os.truncate(source, 1000)
        return 0

    monkeypatch.setattr(os, "copy_file_range", shrink)
    with pytest.raises(CheckpointError, match=f"ended at byte 1000 of {len(CONTENT)}"):
        share_file(source, tmp_path / "out", "copy")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", ["auto", "copy", "link"])
def test_an_existing_target_is_kept(source: Path, tmp_path: Path, mode: share.Mode) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FileExistsError):
        share_file(source, tmp_path / "out", mode)
    assert (tmp_path / "out").read_text() == "mine"


def test_missing_source(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read it"):
        share_file(tmp_path / "gone", tmp_path / "out")
