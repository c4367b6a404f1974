"""A folder of its own for what is measured and compiled."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from exporters.kernels import tuned
from exporters.kernels.folder import VARIABLE


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    tuned.read.cache_clear()
    yield tmp_path
    tuned.read.cache_clear()
