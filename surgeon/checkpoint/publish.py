"""Outputs that appear whole or not at all: staged beside the target, synced to the disk, then renamed.

A killed process leaves at most a `.<name>.staging-*` beside the target, which can be deleted; killed between the two
renames of an overwrite, the previous output is in `.<name>.old-*`.
"""

import errno
import os
import secrets
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from surgeon.errors import TargetError

_FULL = {errno.ENOSPC, errno.EDQUOT}


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
        for kept in (Path.cwd(), Path(os.path.realpath(os.path.expanduser("~")))):
            if real == kept or real in kept.parents:
                raise TargetError(f"{target} holds {kept}, so it is not overwritten; name another place")
    parent = next(path for path in real.parents if os.path.exists(path))
    if not parent.is_dir():
        raise TargetError(f"{target} cannot be written: {parent} is not a directory")
    return real


@contextmanager
def staged(
    target: Path, overwrite: bool = False, protect: Sequence[Path] = (), needed: int | None = None
) -> Iterator[Path]:
    """An empty directory to write into, which becomes `target` when the `with` ends without an exception.

    Until then a previous target stays as it is; after any exception (a KeyboardInterrupt too) nothing of the new one is
    left. Parents are created. `needed` is how many bytes will be written, where known: checked against the free space
    beforehand. Raises TargetError as `check_target`, for a full disk, and where the target cannot be written.
    """
    real = check_target(target, overwrite, protect)
    with _staging(target, real, "", needed) as staging:
        try:
            staging.mkdir()
        except OSError as error:
            raise TargetError(f"{target} cannot be written: {error}") from error
        yield staging
        _sync_tree(staging)
        _publish(staging, real, target, overwrite)


@contextmanager
def staged_file(
    target: Path, overwrite: bool = False, protect: Sequence[Path] = (), needed: int | None = None
) -> Iterator[Path]:
    """As `staged`, for one file: a path (same suffix) to create, which becomes `target`.

    Raises FileNotFoundError when the `with` ends and no file was written there.
    """
    real = check_target(target, overwrite, protect, directory=False)
    with _staging(target, real, real.suffix, needed) as staging:
        yield staging
        _sync(staging)
        _publish(staging, real, target, overwrite)


@contextmanager
def _staging(target: Path, real: Path, suffix: str, needed: int | None) -> Iterator[Path]:
    """A free name beside the target; whatever is there at the end is removed; a full disk becomes a TargetError."""
    staging = _beside(real, "staging", suffix)
    try:
        try:
            real.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(real.parent, os.W_OK | os.X_OK):
                raise TargetError(f"{target} cannot be written: no permission to write in {real.parent}")
        except OSError as error:
            raise TargetError(f"{target} cannot be written: {error}") from error
        free = shutil.disk_usage(real.parent).free
        if needed is not None and needed > free:
            raise TargetError(f"the disk is too full for {target}: {needed:,} bytes needed, {free:,} free")
        yield staging
    except OSError as error:
        if error.errno in _FULL:
            wanted = f" of {needed:,} needed" if needed is not None else ""
            raise TargetError(
                f"the disk is full: {target} was not written ({free:,} bytes{wanted} were free at the start); "
                f"make room or name another place ({error})"
            ) from error
        raise
    finally:
        _remove(staging)


def _beside(real: Path, what: str, suffix: str = "") -> Path:
    return real.with_name(f".{real.name.removesuffix(suffix)}.{what}-{secrets.token_hex(4)}{suffix}")


def _publish(staging: Path, real: Path, target: Path, overwrite: bool) -> None:
    if not os.path.lexists(real):
        os.rename(staging, real)
    elif not overwrite:
        raise TargetError(f"{target} appeared while it was being written; nothing was replaced")
    elif staging.is_file():
        os.replace(staging, real)
    else:
        old = _beside(real, "old")
        try:
            os.rename(real, old)
            os.rename(staging, real)
        except BaseException:
            if os.path.lexists(old) and not os.path.lexists(real):
                os.rename(old, real)
            raise
        _sync(real.parent)
        try:
            shutil.rmtree(old)
        except OSError as error:  # the new one is in place, so this is no failure
            warnings.warn(f"{target} is written, but the one it replaced is still in {old}: {error}", stacklevel=4)
        return
    _sync(real.parent)


def _remove(staging: Path) -> None:
    if staging.is_dir():
        shutil.rmtree(staging)
    else:
        staging.unlink(missing_ok=True)


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
