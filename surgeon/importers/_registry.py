"""Importers, one file per layout in this directory: a file's name is the config's model_type."""

import importlib
import pkgutil
from pathlib import Path

from surgeon.errors import CheckpointError
from surgeon.importers._layout import ReadLayout


def supported() -> list[str]:
    """The model types that have an importer."""
    return sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if not m.name.startswith("_"))


def importer(model_type: str) -> ReadLayout:
    """The `read` of the importer of a config's model_type. Raises CheckpointError where there is none."""
    if model_type not in supported():
        raise CheckpointError(
            f"there is no importer for model_type {model_type!r}; importable: {', '.join(supported())} "
            "(transformers' own layouts need none, and code that comes with a checkpoint is never run)"
        )
    read: ReadLayout = importlib.import_module(f"surgeon.importers.{model_type}").read
    return read
