"""A checkpoint for commands to work on."""

import shutil
from pathlib import Path

import pytest

from checkpoints import tiny_checkpoint


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded checkpoint. Tests that damage one copy it."""
    return tiny_checkpoint(tmp_path_factory.mktemp("cli") / "source", "qwen3_vl", sharded=True)


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "source"))
