"""Tests here export much, and interpret kernels."""

import importlib.util
from collections.abc import Iterator

import pytest

from interpreted_quickly import interpreted_quickly


@pytest.fixture(scope="session", autouse=True)
def quickly(quick_exports: None) -> None:
    """Those too that export without the fixture `export`."""


@pytest.fixture(scope="session", autouse=True)
def quick_kernels() -> Iterator[None]:
    if importlib.util.find_spec("triton") is None:  # kernels have no tests then
        yield
        return
    with interpreted_quickly():
        yield
