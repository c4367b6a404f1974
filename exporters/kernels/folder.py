"""Where what was measured and compiled for GPUs is kept, for the next time.

What is compiled is code that is loaded from here, so the folder is its owner's alone.
"""

import os
import stat
from pathlib import Path

from surgeon.errors import SurgeonError

VARIABLE = "SURGEON_KERNELS_DIR"
"""The environment variable that says where; by default in the user's cache."""


class FolderError(SurgeonError):
    """A folder of compiled code into which someone else may put theirs."""


def folder() -> Path:
    """The folder, made where it can be. Raises FolderError where someone else owns it or may write in it."""
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "surgeon" / "kernels"
    return _private(Path(os.environ.get(VARIABLE) or cached))


def compiled() -> Path:
    """Of kernels compiled ahead of time. Raises FolderError as `folder`."""
    return _private(folder() / "compiled")


def _private(path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700)
    except OSError:
        pass  # it is there, or cannot be: whoever writes there says so, and there is nothing to load
    try:
        about = path.stat()
    except OSError:
        return path
    if about.st_uid != os.geteuid():
        raise FolderError(
            f"{path} holds code that is loaded, and user {about.st_uid} owns it, not {os.geteuid()}; name a folder of "
            f"your own with ${VARIABLE}"
        )
    if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise FolderError(
            f"{path} holds code that is loaded, and others may write there (mode {stat.S_IMODE(about.st_mode):04o}); "
            f"see what is in it, then `chmod 700` it, or name another with ${VARIABLE}"
        )
    return path
