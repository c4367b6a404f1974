"""Rewrites of a bundle's standard graphs for ONNX Runtime, made in memory when a session is.

Each is an onnx-ir pass that says in `replaced` how many nodes it replaced, and leaves alone what it does not know.
"""

from exporters.onnxruntime.rewrites.emulate_bfloat16 import EmulateBFloat16
from exporters.onnxruntime.rewrites.float32_boundary import Float32Boundary
from exporters.onnxruntime.rewrites.grouped_query_attention import GroupedQueryAttention
from exporters.onnxruntime.rewrites.packed_attention import PackedMultiHeadAttention
from exporters.onnxruntime.rewrites.round_float16 import RoundFloat16

__all__ = [
    "EmulateBFloat16",
    "Float32Boundary",
    "GroupedQueryAttention",
    "PackedMultiHeadAttention",
    "RoundFloat16",
]
