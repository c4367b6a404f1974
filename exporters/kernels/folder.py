"""Where what was measured and compiled for GPUs is kept, for the next time."""

import os
from pathlib import Path

VARIABLE = "SURGEON_KERNELS_DIR"
"""The environment variable that says where; by default in the user's cache."""


def folder() -> Path:
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "surgeon" / "kernels"
    return Path(os.environ.get(VARIABLE) or cached)


def compiled() -> Path:
    """Of kernels compiled ahead of time."""
    return folder() / "compiled"
