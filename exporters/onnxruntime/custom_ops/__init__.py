"""Grafts computed by the fused kernels where ONNX Runtime works on a GPU: its CUDA provider's custom operators.

`fused` puts them into a graph and says why it does not; `tables` and `native` hand them to `library.c`, the operators
themselves, which launch without Python.
"""

from exporters.onnxruntime.custom_ops.fused import Device, Fused, cuda_device, fuse

__all__ = ["Device", "Fused", "cuda_device", "fuse"]
