"""Tests here export much."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def quickly(operators_read_once: None) -> None:
    """Those too that export without the fixture `export`."""
