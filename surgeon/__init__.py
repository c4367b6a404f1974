"""surgeon: surgery on pretrained vision-language models, proof that it did no damage, and export."""

from typing import Any

__version__ = "0.1.0"


def load(path: Any, **kwargs: Any) -> Any:
    """A checkpoint with its weights, plain or patched; see `surgeon.models.load`."""
    from surgeon import models  # torch and transformers take seconds to import, and not everyone needs them

    return models.load(path, **kwargs)
