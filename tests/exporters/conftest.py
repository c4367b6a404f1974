"""Tiny checkpoints beside their bundles, exported once for all tests of the exporters."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import pytest
import torch

from pairs import PVM, Pair, make_pair


@pytest.fixture(scope="session", autouse=True)
def operators_read_once() -> Iterator[None]:
    """torch.onnx parses every operator of its library anew for each graph, a quarter of a tiny model's export."""
    patch = pytest.MonkeyPatch()
    registry: Any = pytest.importorskip("torch.onnx._internal.exporter._registration")
    library = getattr(registry, "onnxscript_apis", None)
    if hasattr(library, "get_torchlib_ops"):  # of this torch; where it is called otherwise, tests are slower
        patch.setattr(library, "get_torchlib_ops", cache(library.get_torchlib_ops))
    yield
    patch.undo()


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
