"""Bundles of tiny checkpoints with room for pictures and answers, exported once for all tests of the runtime."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pairs import MAX_LENGTH, Pair, open_gates

from checkpoints import has_tokenizer, tiny_checkpoint
from exporters.onnx.bundle import export_bundle
from patching import apply


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    """export(model_type, patched, dtype), made once for each."""
    if not has_tokenizer():
        pytest.skip("the demo checkpoint, whose tokenizer these need, is not there")
    made: dict[Any, Pair] = {}
    sizes: dict[str, Any] = {"num_hidden_layers": 3}

    def get(model_type: str, patched: bool = True, dtype: torch.dtype = torch.float32) -> Pair:
        key = (model_type, patched, dtype)
        if key not in made:
            folder = tmp_path_factory.mktemp(model_type)
            checkpoint = tiny_checkpoint(folder / "source", model_type, **sizes)
            if patched:
                apply(checkpoint, folder / "patched", "pvm:layers=1,2,latent=32")
                checkpoint = folder / "patched"
                open_gates(checkpoint)
            export_bundle(checkpoint, folder / "bundle", dtype=dtype, max_length=MAX_LENGTH)
            made[key] = Pair(checkpoint, folder / "bundle")
        return made[key]

    return get
