"""torch operator -> ONNX: the table that `torch.onnx.export` translates an exported program with.

One function per operator; each takes the operator's arguments (ONNX values, or Python constants) and emits standard
ONNX 24 nodes, or a call of a function of the project's domain (`functions.py`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch

from exporters.onnx import functions
from exporters.onnx.functions import op


def _rms_norm(x: Any, weight: Any, eps: float) -> Any:
    # stash_type defaults to fp32: the statistics are in fp32 whatever x's dtype is
    return op.RMSNormalization(x, weight, axis=-1, epsilon=eps)


def _rope(x: Any, cos: Any, sin: Any) -> Any:
    return op.RotaryEmbedding(x, cos, sin, interleaved=0)


def _rope_packed(x: Any, cos: Any, sin: Any, num_heads: int) -> Any:
    return op.RotaryEmbedding(x, cos, sin, interleaved=0, num_heads=num_heads)


def _attention(q: Any, k: Any, v: Any, mask: Any, scale: float) -> Any:
    return op.Attention(q, k, v, mask, scale=scale, is_causal=0)[0]


def _attention_packed(q: Any, k: Any, v: Any, mask: Any, num_heads: int, scale: float) -> Any:
    return op.Attention(q, k, v, mask, scale=scale, is_causal=0, q_num_heads=num_heads, kv_num_heads=num_heads)[0]


def _cache_update(cache: Any, new: Any, write_indices: Any) -> Any:
    return op.TensorScatter(cache, new, write_indices, axis=2, mode="linear")


def _split3(x: Any) -> Any:
    return op.Split(x, axis=-1, num_outputs=3)


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """Gemm with transB: the weight is used as it lies in the checkpoint, where MatMul would need a transposed copy."""
    if len(x.shape) == 2:
        return op.Gemm(x, weight, bias, transB=1)
    out_features, in_features = weight.shape
    y = op.Gemm(op.Reshape(x, op.Constant(value_ints=[-1, int(in_features)])), weight, bias, transB=1)
    leading = op.Shape(x, start=0, end=len(x.shape) - 1)
    return op.Reshape(y, op.Concat(leading, op.Constant(value_ints=[int(out_features)]), axis=0))


def _view(x: Any, size: Sequence[int | ir.Value]) -> Any:
    """Reshape with a constant shape where no more than one dimension is symbolic: fewer nodes than computing it."""
    symbolic = [i for i, dim in enumerate(size) if not isinstance(dim, int)]
    if len(symbolic) <= 1 and (not symbolic or -1 not in size):
        return op.Reshape(x, op.Constant(value_ints=[-1 if i in symbolic else dim for i, dim in enumerate(size)]))
    dims = [
        op.Constant(value_ints=[d]) if isinstance(d, int) else op.Reshape(d, op.Constant(value_ints=[-1])) for d in size
    ]
    return op.Reshape(x, op.Concat(*dims, axis=0))


def translation_table() -> dict[Any, Callable[..., Any]]:
    """Torch operator overload -> its translation, as `torch.onnx.export(custom_translation_table=...)` takes it."""
    surgeon, aten = torch.ops.surgeon, torch.ops.aten
    return {
        surgeon.rms_norm.default: _rms_norm,
        surgeon.rope.default: _rope,
        surgeon.rope_packed.default: _rope_packed,
        surgeon.attention.default: _attention,
        surgeon.attention_packed.default: _attention_packed,
        surgeon.cache_update.default: _cache_update,
        surgeon.split3.default: _split3,
        aten.linear.default: _linear,
        aten.view.default: _view,
        aten._unsafe_view.default: _view,
        aten.reshape.default: _view,
        **functions.translation_table(),
    }
