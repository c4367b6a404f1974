"""The runtime reads a bundle's tokenizer, which tiny checkpoints borrow from the demo's."""

import pytest

from checkpoints import has_tokenizer


@pytest.fixture(autouse=True, scope="session")
def tokenizer() -> None:
    if not has_tokenizer():
        pytest.skip("the demo checkpoint, whose tokenizer these need, is not there")
