"""Backbone families: one file each, found by the checkpoint's model_type."""

import importlib
import pkgutil

from surgeon.errors import FamilyError
from surgeon.families.base import Family, Grid, TileLayout, VisionExport

__all__ = ["Family", "Grid", "TileLayout", "VisionExport", "family", "supported"]


def supported() -> list[str]:
    """The model types that have a family file."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_") and m.name != "base")


def family(model_type: str) -> Family:
    """The family of a config's `model_type` (also of its patched form, `surgeon_<model_type>`).

    Raises FamilyError for a model_type without a family file.
    """
    name = model_type.removeprefix("surgeon_")
    if name not in supported():
        raise FamilyError(f"model family {model_type!r} is not supported; supported: {', '.join(supported())}")
    found: Family = importlib.import_module(f"{__name__}.{name}").FAMILY
    return found
