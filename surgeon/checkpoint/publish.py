"""Outputs that appear whole or not at all: staged beside the target, checked, synced to the disk, then renamed.

A killed process leaves a `.<name>.staging-*` beside the target, or, where two renames were needed, the previous output
in `.<name>.old-*`. The next run of the same target removes the one and puts the other back (`surgeon/leftovers.py`).
"""

import errno
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from surgeon.checkpoint.rename import exchange, rename_to_free
from surgeon.cleanup import add_cleanup_errors
from surgeon.errors import SurgeonError, TargetError
from surgeon.leftovers import beside, lock, recover, remove

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def check_target(target: Path, overwrite: bool = False, protect: Sequence[Path] = (), directory: bool = True) -> Path:
    """Refuse a target that `staged` (or, with `directory=False`, `staged_file`) would refuse; writes nothing.

    Returns the real path, symlinks resolved. Raises TargetError where the target exists and `overwrite` is not given,
    is of the other kind (a file for a directory), has a file for a parent, holds the home or working directory, or
    is, contains, or lies within one of `protect` (the sources that are read from).
    """
    real = Path(os.path.realpath(target))
    for source in map(Path, map(os.path.realpath, protect)):
        if real == source:
            raise TargetError(f"{target} is the source itself; name another place")
        if real in source.parents:
            raise TargetError(f"{target} contains the source {source}; name another place")
        if source in real.parents:
            raise TargetError(f"{target} lies within the source {source}; name another place")
    if os.path.exists(real):
        kind = "directory" if directory else "file"
        if real.is_dir() != directory or not (real.is_dir() or real.is_file()):
            raise TargetError(f"{target} exists and is not a {kind}; name another place")
        if not overwrite:
            raise TargetError(f"{target} exists; name another place, or overwrite it with --overwrite")
        for protected in (Path.cwd(), Path(os.path.realpath(os.path.expanduser("~")))):
            if real == protected or real in protected.parents:
                raise TargetError(f"{target} holds {protected}, so it is not overwritten; name another place")
    parent = next(path for path in real.parents if os.path.exists(path))
    if not parent.is_dir():
        raise TargetError(f"{target} cannot be written: {parent} is not a directory")
    return real


@contextmanager
def staged(
    target: Path,
    overwrite: bool = False,
    protect: Sequence[Path] = (),
    needed: int | None = None,
    verify: Callable[[Path], None] | None = None,
) -> Iterator[Path]:
    """An empty directory to write into, which becomes `target` when the `with` ends without an exception.

    Until then a previous target stays as it is; after any exception (a KeyboardInterrupt too) nothing of the new one is
    left. Parents are created. `needed` is how many bytes will be written, where known: checked against the free space
    beforehand. `verify` is called with the directory when everything is in it and on the disk, and raises a
    SurgeonError where it is not what it was to be. What killed runs left of this target is put back or removed first.
    Raises TargetError as `check_target`, for a full disk, where the target cannot be written, and for what `verify`
    refuses.
    """
    real = _real(target, overwrite, protect, directory=True)
    with _staging(target, real, needed) as staging:
        yield staging
        _sync_tree(staging)
        if verify is not None:
            _verify(verify, staging, target)
        if overwrite and os.path.lexists(real):
            _replace_directory(staging, real, target)
        else:
            _publish_new(staging, real, target)
        _sync(real.parent)


@contextmanager
def staged_file(
    target: Path, overwrite: bool = False, protect: Sequence[Path] = (), needed: int | None = None
) -> Iterator[Path]:
    """As `staged`, for one file: a path (same suffix) to create, which becomes `target`.

    Raises FileNotFoundError when the `with` ends and no file was written there.
    """
    real = _real(target, overwrite, protect, directory=False)
    with _staging(target, real, needed) as folder:
        file = folder / real.name
        yield file
        _sync(file)
        if overwrite:
            os.replace(file, real)
        else:
            _publish_new(file, real, target)
        _sync(real.parent)


def _real(target: Path, overwrite: bool, protect: Sequence[Path], directory: bool) -> Path:
    """The checked target, after what killed runs left of it was seen to."""
    recover(Path(os.path.realpath(target)))
    return check_target(target, overwrite, protect, directory)


@contextmanager
def _staging(target: Path, real: Path, needed: int | None) -> Iterator[Path]:
    """An empty, locked directory beside the target; whatever is there at the end is removed; a full disk becomes a
    TargetError."""
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(real.parent, os.W_OK | os.X_OK):
            raise TargetError(f"{target} cannot be written: no permission to write in {real.parent}")
        free = shutil.disk_usage(real.parent).free
        if needed is not None and needed > free:
            raise TargetError(f"the disk is too full for {target}: {needed:,} bytes needed, {free:,} free")
        staging, handle = _make_locked(real)
    except OSError as error:
        raise TargetError(f"{target} cannot be written: {error}") from error
    try:
        yield staging
    except BaseException as error:
        first: BaseException = error
        if isinstance(error, OSError) and error.errno in _FULL:
            of_needed = f" of {needed:,} needed" if needed is not None else ""
            first = TargetError(
                f"the disk is full: {target} was not written ({free:,} bytes{of_needed} were free at the start); "
                f"make room or name another place ({error})"
            )
        add_cleanup_errors(first, lambda: remove(staging), f"remove {staging}")
        if first is not error:
            raise first from error
        raise
    else:
        _remove_or_warn(staging, f"{target} is written, but what it replaced is still in {staging}")
    finally:
        if handle is not None:
            os.close(handle)


def _make_locked(real: Path) -> tuple[Path, int | None]:
    """A new directory, and the handle that holds its lock; None for that where the file system has no locks."""
    while True:
        staging = beside(real, "staging")
        staging.mkdir()
        try:
            return staging, lock(staging)
        except (BlockingIOError, FileNotFoundError):
            continue  # between the two another run took it for a leftover, and removes it
        except OSError:
            return staging, None


def _verify(verify: Callable[[Path], None], staging: Path, target: Path) -> None:
    try:
        verify(staging)
    except SurgeonError as error:
        reason = str(error).replace(str(staging), str(target))
        raise TargetError(f"{target} was not written, because it would not be whole: {reason}") from error


def _publish_new(staging: Path, real: Path, target: Path) -> None:
    try:
        rename_to_free(staging, real)
    except FileExistsError:
        raise TargetError(f"{target} appeared while it was being written; nothing was replaced") from None


def _replace_directory(staging: Path, real: Path, target: Path) -> None:
    """In one step where the system can: then `staging` is what was replaced. Else the previous one is set aside first,
    and put back on any failure."""
    if exchange(staging, real):
        return
    with _locked_where_possible(real):
        old = beside(real, "old")
        try:
            os.rename(real, old)
            os.rename(staging, real)
        except BaseException as error:
            if os.path.lexists(old) and not os.path.lexists(real):
                add_cleanup_errors(error, lambda: os.rename(old, real), f"put {real} back from {old}")
            raise
        _sync(real.parent)
        _remove_or_warn(old, f"{target} is written, but the one it replaced is still in {old}")


@contextmanager
def _locked_where_possible(path: Path) -> Iterator[None]:
    """So that no other run takes what is set aside for what a killed run left."""
    try:
        handle = lock(path)
    except OSError:  # no locks here, or another run is about to do the same
        handle = None
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _remove_or_warn(path: Path, otherwise: str) -> None:
    """Of what is no longer needed: that it stays is no failure."""
    try:
        remove(path)
    except OSError as error:
        warnings.warn(f"{otherwise}: {error}", stacklevel=2)


def _sync_tree(directory: Path) -> None:
    """Every file, then the directories that hold their names, from the innermost out."""
    for root, _, files in os.walk(directory, topdown=False):
        for name in files:
            if not os.path.islink(path := os.path.join(root, name)):
                _sync(path)
        _sync(root)


def _sync(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
