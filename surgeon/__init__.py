"""surgeon: surgery on pretrained vision-language models, proof that it did no damage, and export."""

from typing import Any

from surgeon.version import __version__ as __version__


def load(path: Any, **kwargs: Any) -> Any:
    """A checkpoint with its weights, plain or patched; see `surgeon.models.load`."""
    from surgeon import models  # torch and transformers take seconds to import, and not everyone needs them

    return models.load(path, **kwargs)
