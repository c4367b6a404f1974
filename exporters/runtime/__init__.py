"""Run a bundle, and what every runtime shares."""

from exporters.runtime.bundle_runtime import BundleRuntime
from exporters.runtime.generate import Generation, generate
from exporters.runtime.placement import Picture
from exporters.runtime.runtime import Runtime
from exporters.runtime.session import Provider, SessionOptions, choose_provider
from exporters.runtime.state import State

__all__ = [
    "BundleRuntime",
    "Generation",
    "Picture",
    "Provider",
    "Runtime",
    "SessionOptions",
    "State",
    "choose_provider",
    "generate",
]
