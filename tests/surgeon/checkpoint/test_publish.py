import ast
import errno
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

from surgeon.checkpoint import publish, rename
from surgeon.checkpoint.publish import check_target, staged, staged_file
from surgeon.errors import CheckpointError, TargetError

ROOT = Path(__file__).parents[3]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_appears_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with staged(target) as staging:
        assert staging.parent == target.parent
        (staging / "sub").mkdir()
        (staging / "sub" / "a").write_text("1")
        assert not target.exists()
    assert names(target.parent) == ["out"]
    assert (target / "sub" / "a").read_text() == "1"


def test_permissions_are_those_of_a_new_directory(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with staged(tmp_path / "out") as staging:
        (staging / "a").touch()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, OSError])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_exception_leaves_nothing_new(tmp_path: Path, error: type[BaseException], overwrite: bool) -> None:
    target = tmp_path / "out"
    if overwrite:
        target.mkdir()
        (target / "old").touch()
    with pytest.raises(error), staged(target, overwrite) as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "a").touch()
        raise error
    assert names(tmp_path) == (["out"] if overwrite else [])
    assert not overwrite or names(target) == ["old"]


def test_an_existing_target_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(TargetError, match="exists.*--overwrite"), staged(tmp_path / "out"):
        pytest.fail("entered")
    (tmp_path / "file").touch()
    for overwrite in (False, True):
        with pytest.raises(TargetError, match="not a directory"), staged(tmp_path / "file", overwrite):
            pytest.fail("entered")
    with pytest.raises(TargetError, match="file is not a directory"), staged(tmp_path / "file" / "out"):
        pytest.fail("entered")
    assert names(tmp_path) == ["file", "out"]


def test_overwrite_replaces_whole_and_late(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()
    with staged(target, overwrite=True) as staging:
        (staging / "new").touch()
        assert names(target) == ["old"]
    assert names(target) == ["new"]
    assert names(tmp_path) == ["out"]


@pytest.fixture
def two_renames(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a system without renameat2."""
    monkeypatch.setattr(rename, "_function", lambda: None)


@pytest.mark.usefixtures("two_renames")
def test_a_failed_overwrite_restores_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()
    rename = os.rename

    def fail_on_new(source: Any, to: Any) -> None:
        if ".staging-" in str(source):
            raise OSError(errno.EIO, "broken disk")
        rename(source, to)

    monkeypatch.setattr(os, "rename", fail_on_new)
    with pytest.raises(OSError, match="broken disk"), staged(target, overwrite=True) as staging:
        (staging / "new").touch()
    assert names(tmp_path) == ["out"]
    assert names(target) == ["old"]


def test_a_target_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="appeared"), staged(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()
    assert names(tmp_path / "out") == ["theirs"]
    assert names(tmp_path) == ["out"]


def test_a_link_to_a_directory_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with staged(tmp_path / "link", overwrite=True) as staging:
        (staging / "new").touch()
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "real") == ["new"]


def test_the_source_is_protected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "models" / "source"
    source.mkdir(parents=True)
    (tmp_path / "link").symlink_to("models/source")
    monkeypatch.chdir(tmp_path)
    for target, message in {
        "models/source": "is the source itself",
        "link": "is the source itself",
        "models": "contains the source",
        "models/source/out": "lies within the source",
        "link/out": "lies within the source",
    }.items():
        with pytest.raises(TargetError, match=message):
            check_target(Path(target), overwrite=True, protect=[source])
    assert check_target(Path("models/source-2"), protect=[source]) == source.parent / "source-2"


def test_home_and_working_directory_are_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for target in (Path(), tmp_path, Path("/"), tmp_path / "home"):
        with pytest.raises(TargetError, match="so it is not overwritten"):
            check_target(target, overwrite=True)


def test_full_disk_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(TargetError, match="disk is full.* of 1,000 needed"),
        staged(tmp_path / "a", needed=1000) as staging,
    ):
        (staging / "part").write_text("1")
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(TargetError, match=f"too full.*{10**18:,} bytes needed"), staged(tmp_path / "b", needed=10**18):
        pytest.fail("entered")
    assert names(tmp_path) == []


def test_a_disk_that_really_fills_up(tmp_path: Path) -> None:
    """In a mount namespace of its own, so that the small file system is gone with the process."""
    inside = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=1m tmpfs {tmp_path}"
    if shutil.which("unshare") is None or subprocess.run([*inside, mount], capture_output=True).returncode:
        pytest.skip("needs user and mount namespaces")
    script = textwrap.dedent(f"""
        from pathlib import Path
        from surgeon.checkpoint.publish import staged
        from surgeon.errors import TargetError
        root = Path({str(tmp_path)!r})
        try:
            with staged(root / "out") as staging, open(staging / "w", "wb") as file:
                for _ in range(3):
                    file.write(bytes(1 << 20))
        except TargetError as error:
            print(error, list(root.iterdir()))
    """)
    command = f"{mount} && exec {sys.executable} -c '{script.replace(chr(39), chr(34))}'"
    ran = subprocess.run([*inside, command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "the disk is full" in ran.stdout
    assert ran.stdout.rstrip().endswith("[]")


def test_overwrite_leaves_no_moment_without_a_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if rename._function() is None:
        pytest.skip("needs renameat2")
    target = tmp_path / "out"
    target.mkdir()
    (target / "marker").touch()
    missing, done = [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            if not os.path.exists(target / "marker"):
                missing.append(1)

    def refuse(source: Any, to: Any) -> None:
        raise AssertionError("the target is renamed away")

    monkeypatch.setattr(os, "rename", refuse)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(20):
            with staged(target, overwrite=True) as staging:
                (staging / "marker").touch()
    finally:
        done.set()
        watcher.join()
    assert not missing
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("stage", [staged, staged_file])
def test_a_cleanup_that_fails_does_not_hide_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: Any) -> None:
    def broken(path: Any, *args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EIO, "broken disk", str(path))

    monkeypatch.setattr(shutil, "rmtree", broken)
    with pytest.raises(ZeroDivisionError, match="the first") as raised, stage(tmp_path / "out"):
        raise ZeroDivisionError("the first")
    (note,) = raised.value.__notes__
    assert "could not remove" in note and "broken disk" in note
    with pytest.raises(TargetError, match="the disk is full") as full, stage(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "broken disk" in full.value.__notes__[0]


def test_what_was_replaced_and_cannot_be_removed_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()

    def broken(path: Any, *args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EIO, "broken disk", str(path))

    monkeypatch.setattr(shutil, "rmtree", broken)
    with (
        pytest.warns(UserWarning, match="is written, but what it replaced is still in .*broken disk"),
        staged(tmp_path / "out", overwrite=True) as staging,
    ):
        (staging / "new").touch()
    assert names(tmp_path / "out") == ["new"]


def test_a_file_is_staged_likewise(tmp_path: Path) -> None:
    target = tmp_path / "new" / "report.json"
    with staged_file(target) as path:
        assert path.suffix == ".json"
        path.write_text("1")
        assert not target.exists()
    assert target.read_text() == "1"
    with pytest.raises(TargetError, match="exists"), staged_file(target):
        pytest.fail("entered")
    with pytest.raises(RuntimeError), staged_file(target, overwrite=True) as path:
        path.write_text("2")
        raise RuntimeError
    assert target.read_text() == "1"
    with staged_file(target, overwrite=True) as path:
        path.write_text("3")
    assert target.read_text() == "3"
    with pytest.raises(TargetError, match="not a file"), staged_file(target.parent, overwrite=True):
        pytest.fail("entered")
    with pytest.raises(FileNotFoundError), staged_file(tmp_path / "never"):
        pass
    assert names(tmp_path) == ["new"]
    assert names(target.parent) == ["report.json"]


def test_everything_is_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename_to_free = os.fsync, publish.rename_to_free

    def record_sync(handle: int) -> None:
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def record_rename(source: Path, to: Path) -> None:
        events.append("rename")
        rename_to_free(source, to)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(publish, "rename_to_free", record_rename)
    with staged(tmp_path / "out", verify=lambda directory: events.append("verify")) as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "a").touch()
        (staging / "b").touch()
    assert events == ["a", "sub", "b", staging.name, "verify", "rename", tmp_path.name]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_not_whole_is_not_published(tmp_path: Path, overwrite: bool) -> None:
    target = tmp_path / "out"
    if overwrite:
        target.mkdir()
        (target / "old").touch()

    def refuse(directory: Path) -> None:
        assert names(directory) == ["new"]
        raise CheckpointError(f"{directory / 'new'} is short")

    message = f"{target} was not written, because it would not be whole: {target / 'new'} is short"
    with pytest.raises(TargetError) as raised, staged(target, overwrite, verify=refuse) as staging:
        (staging / "new").touch()
    assert str(raised.value) == message
    assert names(tmp_path) == (["out"] if overwrite else [])
    assert not overwrite or names(target) == ["old"]


def test_every_directory_that_is_published_is_verified() -> None:
    """Whoever adds another publisher says what its output must be."""
    calls = [
        (path.relative_to(ROOT), node)
        for room in ("surgeon", "passes", "exporters", "commands")
        for path in (ROOT / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "staged"
    ]
    assert {str(path) for path, _ in calls} >= {"surgeon/patch.py", "exporters/onnx/bundle.py"}
    unverified = [
        f"{path}:{node.lineno}"
        for path, node in calls
        if len(node.args) < 5 and "verify" not in {keyword.arg for keyword in node.keywords}
    ]
    assert unverified == []
