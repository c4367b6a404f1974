"""A driver that interprets kernels, and a folder of its own for what is compiled."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cuda_stand_in import StandIn, stand_in
from exporters.kernels.folder import VARIABLE
from exporters.runtime.custom_ops import native


@pytest.fixture(scope="session", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("kernels")
        patch.setenv(VARIABLE, str(path))
        native.build.cache_clear()
        yield path
    native.build.cache_clear()


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[StandIn]:
    found, alive = stand_in(tmp_path)
    yield found
    del alive
