"""The passes: one file per rewrite."""

import sys

from surgeon.pipeline import Pass, discover


def registry() -> dict[str, type[Pass]]:
    """Every pass in this package, by name."""
    return discover(sys.modules[__name__])
