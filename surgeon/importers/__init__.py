"""Checkpoints in other layouts: their config and tensors become transformers' own, and none of their code is run.

One file per layout, whose `IMPORTER` recognises its checkpoints. Files with a leading underscore are shared.
"""

from surgeon.importers._layout import Importer, Layout
from surgeon.importers._registry import importer_of, recognise, refuse_importable, supported

__all__ = ["Importer", "Layout", "importer_of", "recognise", "refuse_importable", "supported"]
