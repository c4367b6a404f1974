"""Checkpoints in other layouts: their config and tensors become transformers' own, and none of their code is run.

One file per layout, found by its name, which is the config's model_type. Files with a leading underscore are shared.
"""

from surgeon.importers._convert import ImportReport, import_checkpoint
from surgeon.importers._layout import Layout
from surgeon.importers._registry import importer, supported

__all__ = ["ImportReport", "Layout", "import_checkpoint", "importer", "supported"]
