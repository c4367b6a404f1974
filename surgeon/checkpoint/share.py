"""A file in a second place without writing it a second time, where the file system can."""

import errno
import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from surgeon.cleanup import add_cleanup_errors
from surgeon.errors import CheckpointError

Mode = Literal["auto", "copy", "link"]

_FICLONE = 0x40049409
_CHUNK = 64 << 20
# Anything else (a full disk, a broken one) is a failure, not a reason to try another way.
_UNSUPPORTED = {
    errno.EOPNOTSUPP,
    errno.ENOTTY,
    errno.ENOSYS,
    errno.EINVAL,
    errno.EXDEV,
    errno.EPERM,
    errno.EACCES,
    errno.EMLINK,
    errno.ETXTBSY,
}


@dataclass(frozen=True)
class Shared:
    """How a file came to its second place, and how many bytes that wrote."""

    method: Literal["reflink", "hardlink", "copy"]
    bytes_written: int


def share_file(
    source: Path, target: Path, mode: Mode = "auto", progress: Callable[[int], None] | None = None
) -> Shared:
    """Put `source`'s content at `target`, which must not exist. Symlinks are resolved first.

    auto: a reflink (shared blocks, copied when either side is written to), else a copy. link: a reflink, else a hard
    link, else a copy; through a hard link, a later write in place to one reaches the other. copy: every byte is
    written. `progress(n)` is called after each n bytes copied. Only content is kept, not times, owner or permissions
    (a hard link has them all). Raises CheckpointError where the source cannot be read whole, and OSError, leaving no
    target, where the target cannot be written.
    """
    real = Path(os.path.realpath(source))
    try:
        file = os.open(real, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{source}: cannot read it: {error.strerror or error}") from error
    try:
        if mode != "copy" and _reflink(file, target):
            return Shared("reflink", 0)
        if mode == "link" and _hardlink(real, target):
            return Shared("hardlink", 0)
        return Shared("copy", _copy(file, source, target, progress))
    finally:
        os.close(file)


def _create(target: Path) -> int:
    return os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def _reflink(source: int, target: Path) -> bool:
    out = _create(target)
    try:
        fcntl.ioctl(out, _FICLONE, source)
        return True
    except OSError as error:
        add_cleanup_errors(error, target.unlink, f"remove {target}")
        if error.errno not in _UNSUPPORTED or target.exists():
            raise
        return False
    finally:
        os.close(out)


def _hardlink(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
        return True
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return False


def _copy(source: int, source_path: Path, target: Path, progress: Callable[[int], None] | None) -> int:
    size = os.fstat(source).st_size
    out = _create(target)
    try:
        done = 0
        step = _copy_range
        while done < size:
            try:
                count = step(source, out, min(_CHUNK, size - done))
            except OSError as error:
                if step is _copy_plain or error.errno not in _UNSUPPORTED:
                    raise
                count = 0
            if count:
                done += count
                if progress:
                    progress(count)
            elif step is not _copy_plain:  # some file systems also answer 0 where they cannot
                step = _copy_plain
            else:
                raise CheckpointError(
                    f"{source_path}: ended at byte {done} of {size} while it was copied; is it being written?"
                )
        return done
    except BaseException as error:
        add_cleanup_errors(error, target.unlink, f"remove {target}")
        raise
    finally:
        os.close(out)


def _copy_range(source: int, out: int, count: int) -> int:
    """In the kernel; both files' positions move on."""
    return os.copy_file_range(source, out, count)


def _copy_plain(source: int, out: int, count: int) -> int:
    data = memoryview(os.read(source, min(count, 1 << 20)))
    count_written = 0
    while count_written < len(data):
        count_written += os.write(out, data[count_written:])
    return count_written
