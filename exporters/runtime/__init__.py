"""Run a bundle."""

from exporters.runtime.bundle_runtime import BundleRuntime, Picture, State
from exporters.runtime.generate import Generation, generate
from exporters.runtime.session import Provider, SessionOptions, choose_provider

__all__ = [
    "BundleRuntime",
    "Generation",
    "Picture",
    "Provider",
    "SessionOptions",
    "State",
    "choose_provider",
    "generate",
]
