"""Tests here export much."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def quickly(quick_exports: None) -> None:
    """Those too that export without the fixture `export`."""
