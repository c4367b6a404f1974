"""`surgeon bench`: forms of a model side by side, each in a process of its own."""

from exporters.bench.chart import draw
from exporters.bench.measure import Measured, Workload, measure

__all__ = ["Measured", "Workload", "draw", "measure"]
