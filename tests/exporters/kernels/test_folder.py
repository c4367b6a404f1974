"""The folder of compiled code is its owner's alone."""

import os
from pathlib import Path

import pytest

from exporters.kernels import tuned
from exporters.kernels.folder import VARIABLE, FolderError, compiled, folder
from exporters.onnxruntime.custom_ops import native


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "deep" / "kernels"))
    return tmp_path / "deep" / "kernels"


def test_it_is_made_for_its_owner_alone_whatever_the_umask(kernels: Path) -> None:
    umask = os.umask(0)
    try:
        assert folder() == kernels and compiled() == kernels / "compiled"
    finally:
        os.umask(umask)
    assert [path.stat().st_mode & 0o777 for path in (kernels, kernels / "compiled")] == [0o700, 0o700]


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777, 0o1777])
def test_one_that_others_may_write_is_refused(kernels: Path, mode: int) -> None:
    kernels.mkdir(parents=True)
    kernels.chmod(mode)
    for use in (folder, compiled, native.build.__wrapped__, lambda: tuned.load(tuned.path_of("NVIDIA H200"))):
        with pytest.raises(FolderError, match=f"others may write there .mode {mode:04o}.*chmod 700.*{VARIABLE}"):
            use()
    assert list(kernels.iterdir()) == []
    kernels.chmod(0o755)  # others may read it
    assert folder() == kernels


def test_a_folder_in_it_that_others_may_write_is_refused(kernels: Path) -> None:
    compiled().chmod(0o777)
    assert folder() == kernels
    with pytest.raises(FolderError, match="compiled holds code.*others may write"):
        compiled()


def test_one_that_is_someone_elses_is_refused(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder()
    monkeypatch.setattr(os, "geteuid", lambda: kernels.stat().st_uid + 1)
    with pytest.raises(FolderError, match=f"user {os.getuid()} owns it, not {os.getuid() + 1}"):
        folder()


def test_what_a_link_leads_to_counts(kernels: Path, tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    kernels.parent.mkdir()
    kernels.symlink_to(tmp_path / "open")
    with pytest.raises(FolderError):
        folder()


def test_one_that_cannot_be_made_holds_nothing(kernels: Path) -> None:
    kernels.parent.write_text("a file")
    assert folder() == kernels
    with pytest.raises(OSError):
        tuned.load(tuned.path_of("NVIDIA H200"))
