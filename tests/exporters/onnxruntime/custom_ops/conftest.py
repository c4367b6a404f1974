"""A driver that interprets kernels."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cuda_stand_in import StandIn, stand_in
from exporters.onnxruntime.custom_ops import fused


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setattr(fused, "_SLOTS", 128)  # split in two, where the usual 1,024 would be interpreted 16 times
    driver, alive = stand_in(tmp_path)
    yield driver
    del alive
