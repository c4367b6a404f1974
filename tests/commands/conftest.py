"""A checkpoint for a command to damage."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "source"))
