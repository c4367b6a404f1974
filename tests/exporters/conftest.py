"""Tests here export much."""

import pytest

from exporters.onnx import trace as tracing
from traced_once import trace_afresh


@pytest.fixture(scope="session", autouse=True)
def quickly(quick_exports: None) -> None:
    """Those too that export without the fixture `export`."""


@pytest.fixture
def traced_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test that changes what is traced: it takes no other's trace, and gives none."""
    monkeypatch.setattr(tracing, "trace", trace_afresh)
