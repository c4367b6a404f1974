"""fp16 graphs whose every operator rounds to fp16."""

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, ShapeInferencePass

from exporters.onnx.precision.float32_nodes import MOVES_DATA, compute_in_float32
from exporters.onnx.rewrite import Rewrite

_KERNELS = frozenset(
    (
        "Attention",
        "Cast",
        "CastLike",
        "GroupQueryAttention",
        "LayerNormalization",
        "MultiHeadAttention",
        "RMSNormalization",
        "RotaryEmbedding",
    )
)
"""What ONNX Runtime's CPU provider computes in fp16 itself, and what cannot become larger than what it reads."""


class RoundFloat16(Rewrite):
    """Operators without an fp16 kernel on the CPU get casts to fp32 and back.

    ONNX Runtime puts such casts around them itself, and then takes out those that meet between two operators: what lies
    between is fp32 there, does not overflow, and a graph that is broken on a device looks sound. Casts of the graph's
    own stay. Functions are inlined, because what is inside them rounds too.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        self.replaced = 0
        if not any(value.dtype == _HALF for value in (*model.graph.inputs, *model.graph.outputs)):
            return ir.passes.PassResult(model, modified=False)
        if model.functions:
            InlinePass()(model)
        ShapeInferencePass()(model)
        nodes = [node for node in model.graph if node.op_type not in MOVES_DATA | _KERNELS]
        self.replaced = compute_in_float32(model.graph, nodes, reduced=(_HALF,))
        return ir.passes.PassResult(model, modified=self.replaced > 0)


_HALF = ir.DataType.FLOAT16
