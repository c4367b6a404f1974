"""A driver that interprets kernels."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cuda_stand_in import StandIn, stand_in


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[StandIn]:
    library, alive = stand_in(tmp_path)
    yield library
    del alive
