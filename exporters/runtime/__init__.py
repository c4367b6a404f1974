"""What every runtime of a bundle's graphs does on the host: prompts, images, memory, positions, decoding."""

from exporters.runtime.placement import ImageFeatures
from exporters.runtime.runtime import Runtime
from exporters.runtime.state import State

__all__ = ["ImageFeatures", "Runtime", "State"]
