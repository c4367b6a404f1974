"""Tiny checkpoints beside their bundles, exported once for all tests of the exporters."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from pairs import PVM, Pair, make_pair


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    """export(model_type, recipe, dtype, **options of tiny_checkpoint), made once for each."""
    made: dict[Any, Pair] = {}

    def get(model_type: str, recipe: Sequence[str] = PVM, dtype: torch.dtype = torch.float32, **options: Any) -> Pair:
        if not recipe:
            options.pop("visibility", None)  # there is nothing to see
        key = (model_type, tuple(recipe), dtype, *sorted(options.items()))
        if key not in made:
            made[key] = make_pair(tmp_path_factory.mktemp(model_type), model_type, recipe, dtype, **options)
        return made[key]

    return get
