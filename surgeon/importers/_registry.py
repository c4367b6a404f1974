"""Importers, found by the layout's name."""

from collections.abc import Collection, Mapping
from typing import Any

from surgeon.checkpoint.reader import Checkpoint
from surgeon.discovery import Extensions
from surgeon.errors import CheckpointError
from surgeon.importers._layout import Importer

_IMPORTERS = Extensions("surgeon.importers", "IMPORTER", group="surgeon.importers")


def supported() -> list[str]:
    """The names of the layouts that have an importer."""
    return _IMPORTERS.names()


def recognise(config: Mapping[str, Any], tensors: Collection[str]) -> tuple[str, Importer] | None:
    """The layout of a checkpoint with this config.json and tensors of these names, and its importer; None for one that
    needs none, or has none."""
    importer: Importer
    for name, importer in _IMPORTERS.all().items():
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
