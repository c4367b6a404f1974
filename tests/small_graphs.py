"""ONNX graphs small enough to read, for tests."""

from collections.abc import Mapping

import numpy as np
import onnx
import onnx.parser
import onnx.shape_inference
import onnx_ir as ir
import onnxruntime as ort

B, H, HKV, D, SMAX = 3, 4, 2, 16, 24

# Query and keys are rotated, as in a decoder; keys come transposed, values already by head.
CACHED_ATTENTION = """
<ir_version: 11, opset_import: ["" : 24]>
decoder (float[B, S, 4, 16] q, float[B, S, 2, 16] k, float[B, 2, S, 16] v, float[B, S, 8] cos, float[B, S, 8] sin,
         int64[B] write_indices, float[B, 2, 24, 16] past_k, float[B, 2, 24, 16] past_v)
    => (float[B, S, 4, 16] y, float[B, 2, 24, 16] present_k, float[B, 2, 24, 16] present_v)
{
    new = Shape <start = 1, end = 2> (q)
    count = Squeeze (new)
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    smax = Constant <value_int = 24> ()
    range = Range (zero, count, one)
    query_shape = Constant <value_ints = [1, 1, -1, 1]> ()
    row_shape = Constant <value_ints = [-1, 1, 1, 1]> ()
    slot_shape = Constant <value_ints = [1, 1, 1, -1]> ()
    offsets = Reshape (range, query_shape)
    starts = Reshape (write_indices, row_shape)
    ends = Add (starts, offsets)
    all_slots = Range (zero, smax, one)
    slots = Reshape (all_slots, slot_shape)
    MASK
    q_heads = Transpose <perm = [0, 2, 1, 3]> (q)
    k_heads = Transpose <perm = [0, 2, 1, 3]> (k)
    q_rotated = RotaryEmbedding (q_heads, cos, sin)
    k_rotated = RotaryEmbedding (k_heads, cos, sin)
    present_k = TensorScatter <axis = 2> (past_k, k_rotated, write_indices)
    present_v = TensorScatter <axis = 2> (past_v, v, write_indices)
    attended = Attention <scale = 0.3 ATTRIBUTES> (q_rotated, present_k, present_v, mask)
    y = Transpose <perm = [0, 2, 1, 3]> (attended)
}
"""


def parse(text: str) -> ir.Model:
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text), strict_mode=True, data_prop=True)
    return ir.from_proto(proto)


def cached_attention(mask: str = "mask = LessOrEqual (slots, ends)", attributes: str = "") -> ir.Model:
    return parse(CACHED_ATTENTION.replace("MASK", mask).replace("ATTRIBUTES", attributes))


def session(model: ir.Model) -> ort.InferenceSession:
    quiet = ort.SessionOptions()
    quiet.log_severity_level = 4
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), quiet, providers=["CPUExecutionProvider"])


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def run(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    return session(model).run(None, dict(feeds))
