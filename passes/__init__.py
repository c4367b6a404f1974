"""The passes: one file per rewrite."""

import warnings

from surgeon.discovery import Extensions
from surgeon.pipeline import Pass

_PASSES = Extensions("passes", "PASS", group="surgeon.passes")


def registry() -> dict[str, type[Pass]]:
    """Every pass, of this package or of another that is installed, by the name that recipes call it. Warns of one of
    another package whose entry point has another name, and of one that cannot be loaded."""
    passes_by_name: dict[str, type[Pass]] = {}
    for name, pass_class in _PASSES.all().items():
        if not _PASSES.has_file(name) and pass_class.name != name:
            warnings.warn(
                f"left out: the pass of the entry point {name!r} calls itself {pass_class.name!r}; the two names must "
                "be the same",
                stacklevel=2,
            )
            continue
        passes_by_name[pass_class.name] = pass_class
    return passes_by_name
