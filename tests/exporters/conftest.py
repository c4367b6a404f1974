"""Bundles of tiny checkpoints, exported once for all tests of the exporters."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bundles import MAX_LENGTH, Exported, trained
from checkpoints import tiny_checkpoint
from exporters.onnx.bundle import export_bundle
from patching import apply


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """export(model_type, patched, dtype, **options of tiny_checkpoint), made once per combination."""
    made: dict[Any, Exported] = {}

    def get(model_type: str, patched: bool = False, dtype: torch.dtype = torch.float32, **options: Any) -> Exported:
        key = (model_type, patched, dtype, *sorted(options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp(model_type)
            checkpoint = tiny_checkpoint(folder / "source", model_type, **options)
            if patched:
                apply(folder / "source", folder / "patched", "pvm:layers=1,3,latent=32")
                checkpoint = trained(folder / "patched")
            manifest = export_bundle(checkpoint, folder / "bundle", dtype=dtype, max_length=MAX_LENGTH)
            made[key] = Exported(checkpoint, folder / "bundle", manifest)
        return made[key]

    return get
