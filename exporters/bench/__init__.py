"""`surgeon bench`: forms of a model side by side, each in a process of its own."""

from exporters.bench.measure import Measured, Workload, measure
from exporters.bench.picture import draw

__all__ = ["Measured", "Workload", "draw", "measure"]
