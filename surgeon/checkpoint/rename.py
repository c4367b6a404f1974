"""Renames that Python has no name for: never over something else, and two paths exchanged in one step."""

import ctypes
import errno
import os
from functools import cache
from pathlib import Path
from typing import Any

_AT_FDCWD = -100
_NOREPLACE, _EXCHANGE = 1, 2
# of the kernel, the file system, or a sandbox around the process
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}


def rename_to_free(source: Path, target: Path) -> None:
    """Rename `source` to `target`, which must not exist. Raises FileExistsError where it does, and OSError.

    Where the system cannot do that in one step, a target that appears in the same moment may be replaced.
    """
    if _renameat2(source, target, _NOREPLACE):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    os.rename(source, target)


def exchange(first: Path, second: Path) -> bool:
    """Exchange what two paths of one file system name, in one step: neither is missing at any moment.

    False, and nothing is done, where the system cannot. Raises OSError.
    """
    return _renameat2(first, second, _EXCHANGE)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    function = _function()
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


@cache
def _function() -> Any:
    """renameat2 of the C library; None where it has none (it is Linux's, with glibc from 2.28 on)."""
    return getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
