"""Attention over packed heads as ONNX Runtime's own operator."""

import onnx_ir as ir
from onnx_ir.tape import Tape

from exporters.onnx.rewrite import Rewrite, is_standard
from exporters.onnxruntime.rewrites._nodes import (
    CONTRIB,
    attention_scale,
    int_attribute,
    sets_only,
    static_size,
    take_over,
)


class PackedMultiHeadAttention(Rewrite):
    """Attention over packed heads [B, S, H * hd] without a mask -> com.microsoft.MultiHeadAttention.

    ONNX Runtime's CPU provider computes the standard operator with an S x S matrix for each head, and the contrib
    operator in tiles: half the time, and at 16,384 patches 0.24 GiB instead of 17.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        self.replaced = 0
        for node in list(model.graph):
            heads = int_attribute(node, "q_num_heads")
            if not is_standard(node, "Attention") or heads == 0 or len(node.outputs) != 1:
                continue
            if any(value is not None for value in node.inputs[3:]):
                continue
            query = node.inputs[0]
            if int_attribute(node, "kv_num_heads") != heads or query is None or query.shape is None:
                continue
            if not sets_only(node, {"q_num_heads", "kv_num_heads", "scale"}):
                continue
            width = query.shape[2]
            if "scale" not in node.attributes and not isinstance(width, int):
                continue
            scale = node.attributes.get_float("scale", 0.0) or attention_scale(node, static_size(width) // heads)
            tape = Tape()
            attended = tape.op(
                "MultiHeadAttention", node.inputs[:3], {"num_heads": heads, "scale": scale}, domain=CONTRIB
            )
            model.graph.insert_before(node, tape.nodes)
            take_over(node.outputs[0], attended)
            model.graph.remove(node, safe=True)
            self.replaced += 1
        if self.replaced:
            model.opset_imports[CONTRIB] = 1
        return ir.passes.PassResult(model, modified=self.replaced > 0)
