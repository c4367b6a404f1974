"""Importers, one file per layout in this directory: every module's `IMPORTER`."""

import importlib
import pkgutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from surgeon.checkpoint.reader import Checkpoint
from surgeon.errors import CheckpointError
from surgeon.importers._layout import Importer


def supported() -> list[str]:
    """The names of the layouts that have an importer."""
    return sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if not m.name.startswith("_"))


def recognise(config: Mapping[str, Any], tensors: Collection[str]) -> tuple[str, Importer] | None:
    """The layout of a checkpoint with this config.json and tensors of these names, and its importer; None for one that
    needs none, or has none."""
    for name in supported():
        importer: Importer = importlib.import_module(f"surgeon.importers.{name}").IMPORTER
        if importer.recognises(config, tensors):
            return name, importer
    return None


def importer_of(source: Checkpoint) -> tuple[str, Importer]:
    """The layout of an opened checkpoint and its importer. Raises CheckpointError where there is none."""
    recognised = recognise(source.config, source.tensors)
    if recognised is None:
        raise CheckpointError(
            f"there is no importer for model_type {source.config['model_type']!r}; importable: "
            f"{', '.join(supported())} (transformers' own layouts need none, and code that comes with a checkpoint is "
            "never run)"
        )
    return recognised


def refuse_importable(source: Checkpoint) -> None:
    """Raises CheckpointError for a checkpoint that has to be imported before it can be used: a part of it would be left
    out, or transformers has no model for it."""
    recognised = recognise(source.config, source.tensors)
    if recognised is not None:
        raise CheckpointError(
            f"{source.directory} is in the {recognised[0]} layout, which needs code of its own: convert it first, with "
            f"surgeon import {source.directory} OUT"
        )
