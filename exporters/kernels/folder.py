"""Where what was made for this machine's GPUs is kept."""

import os
from pathlib import Path

VARIABLE = "SURGEON_KERNELS_DIR"
"""The environment variable that says where; by default in the user's cache."""


def folder() -> Path:
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "surgeon" / "kernels"
    return Path(os.environ.get(VARIABLE) or cached)
