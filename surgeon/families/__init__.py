"""Backbone families: one file each, found by the checkpoint's model_type."""

from surgeon.discovery import Extensions
from surgeon.errors import FamilyError
from surgeon.families._base import Family, Grid, TileLayout, VisionExport

__all__ = ["Family", "Grid", "TileLayout", "VisionExport", "family", "supported"]

_FAMILIES = Extensions("surgeon.families", "FAMILY", group="surgeon.families")


def supported() -> list[str]:
    """The model types that have a family."""
    return _FAMILIES.names()


def family(model_type: str) -> Family:
    """The family of a config's `model_type` (also of its patched form, `surgeon_<model_type>`).

    Raises FamilyError for a model_type without a family.
    """
    described: Family | None = _FAMILIES.get(model_type.removeprefix("surgeon_"))
    if described is None:
        raise FamilyError(f"model family {model_type!r} is not supported; supported: {', '.join(supported())}")
    return described
