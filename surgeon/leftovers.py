"""What killed runs leave beside a target, and how to tell it from what a run is still writing.

`.<name>.staging-<random>` is what was to become `<name>`, or what `<name>` replaced; `.<name>.old-<random>` is what it
was about to replace, and the only copy where `<name>` is missing. Whoever makes one holds a lock (flock) on it, which
ends with its process, so a lock that can be taken says that nobody is left. Where the file system has no locks nothing
is touched.
"""

import fcntl
import os
import re
import secrets
import shutil
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

Kind = Literal["staging", "old"]
Use = Literal["left", "in use", "unknown"]

# A file's suffix stands behind the random part in what earlier versions left.
_NAME = re.compile(r"\.(?P<stem>.+)\.(?P<kind>staging|old)-[0-9a-f]{8}(?P<suffix>\.\w+)?")


@dataclass(frozen=True)
class Leftover:
    path: Path
    target: Path
    """What it was to become, or was."""
    kind: Kind

    @property
    def only_copy(self) -> bool:
        """Whether it is all that is left of its target."""
        return self.kind == "old" and not os.path.lexists(self.target)


def beside(target: Path, kind: Kind) -> Path:
    """A free name beside the target."""
    return target.with_name(f".{target.name}.{kind}-{secrets.token_hex(4)}")


def find(directory: Path, target_name: str | None = None) -> list[Leftover]:
    """What lies in `directory`, of one target or of all. Raises OSError where the directory cannot be listed."""
    leftovers = []
    for path in sorted(directory.iterdir()):
        if match := _NAME.fullmatch(path.name):
            target = directory / (match["stem"] + (match["suffix"] or ""))
            if target_name in (None, target.name):
                leftovers.append(Leftover(path, target, cast(Kind, match["kind"])))
    return leftovers


def lock(path: Path) -> int:
    """Lock a directory or file, without waiting -> the open handle that holds the lock.

    Raises BlockingIOError where another process holds it, FileNotFoundError where it is gone, and OSError where the
    file system has no locks or it cannot be opened.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between opening and locking it may have been moved, or removed.
        if not os.path.samestat(os.fstat(handle), os.stat(path, follow_symlinks=False)):
            raise FileNotFoundError(path)
    except BaseException:
        os.close(handle)
        raise
    return handle


def use(leftover: Leftover) -> Use:
    """Whether a run is still at work on it; unknown where its file system or its permissions do not tell."""
    try:
        os.close(lock(leftover.path))
    except BlockingIOError:
        return "in use"
    except OSError:
        return "unknown"
    return "left"


def recover(target: Path) -> None:
    """Put back the only copy of `target` that a killed run left, and remove everything else that killed runs left of
    it. What is in use stays. What cannot be removed or put back is warned of."""
    try:
        leftovers = find(target.parent, target.name)
    except OSError:  # no such directory, or one that cannot be listed: whoever writes there says what is wrong
        return
    # the last that was set aside first: the others are then no longer all that is left
    for leftover in sorted(leftovers, key=_changed, reverse=True):
        with suppress(BlockingIOError, FileNotFoundError):  # in use, or gone by now
            _recover(leftover)


def _recover(leftover: Leftover) -> None:
    try:
        handle = lock(leftover.path)
    except (BlockingIOError, FileNotFoundError):
        raise
    except OSError:  # no locks here, or not ours
        return
    try:
        if leftover.only_copy:
            os.rename(leftover.path, leftover.target)
            warnings.warn(
                f"{leftover.target} was put back from {leftover.path.name}: a run that was replacing it was killed",
                stacklevel=2,
            )
        else:
            remove(leftover.path)
    except OSError as error:
        doing = "put back" if leftover.only_copy else "removed"
        warnings.warn(f"{leftover.path}, which a killed run left, cannot be {doing}: {error}", stacklevel=2)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a directory or file that may be gone, or may be going by another run's hand. Raises OSError."""
    while os.path.lexists(path):
        with suppress(FileNotFoundError):  # something inside it that another run removed
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _changed(leftover: Leftover) -> int:
    try:
        return leftover.path.lstat().st_ctime_ns
    except FileNotFoundError:
        return 0
