"""The passes: one file per rewrite."""

from surgeon.discovery import Extensions
from surgeon.pipeline import Pass

_PASSES = Extensions("passes", "PASS", group="surgeon.passes")


def registry() -> dict[str, type[Pass]]:
    """Every pass, of this package or of another that is installed, by the name that recipes call it."""
    return {pass_class.name: pass_class for pass_class in _PASSES.all().values()}
