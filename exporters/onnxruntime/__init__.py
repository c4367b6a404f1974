"""A bundle in ONNX Runtime: sessions, what is rewritten for it, and fused kernels as its custom operators."""

from exporters.onnxruntime.bundle_runtime import BundleRuntime
from exporters.onnxruntime.session import Provider, SessionOptions, choose_provider

__all__ = ["BundleRuntime", "Provider", "SessionOptions", "choose_provider"]
