"""The number of an Attention's heads as a constant where the graph computes it."""

import numpy as np
import onnx_ir as ir

from exporters.onnx.rewrite import Rewrite, is_standard, static

_KEEPS_HEADS = ("RMSNormalization", "RotaryEmbedding", "Transpose")


class StaticHeads(Rewrite):
    """`Reshape(Gemm(...), computed shape)` in front of an Attention -> the same, and a Reshape to [0, 0, H, hd].

    TensorRT takes a Reshape whose -1 it cannot resolve for one of an unknown number of heads, and then for no grouped
    Attention at all. H is the width of the Gemm's weight by the head size of the keys: were it another, the second
    Reshape would not fit and nothing would run.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        self.replaced = 0
        pinned: set[ir.Node] = set()
        for node in list(model.graph):
            if not is_standard(node, "Attention") or "q_num_heads" in node.attributes:
                continue
            query, keys = node.inputs[:2]
            if query is None or (query.shape is not None and static(query.shape[1]) is not None):
                continue
            head_dim = None if keys is None or keys.shape is None else static(keys.shape[3])
            reshape = _source(query)
            if head_dim is None or reshape is None or reshape in pinned:
                continue
            width = _width(reshape.inputs[0])
            if width is None or width % head_dim or _is_constant(reshape.inputs[1]):
                continue
            pinned.add(reshape)
            _pin(model, reshape, width // head_dim, head_dim)
            self.replaced += 1
        return ir.passes.PassResult(model, modified=self.replaced > 0)


def _source(query: ir.Value | None) -> ir.Node | None:
    """The Reshape that gave a query its heads, looking through what leaves them as they are."""
    while query is not None:
        node = query.producer()
        if node is not None and is_standard(node, "Reshape"):
            return node
        if node is None or node.domain not in ("", "ai.onnx") or node.op_type not in _KEEPS_HEADS:
            return None
        query = node.inputs[0]
    return None


def _width(value: ir.Value | None) -> int | None:
    """Of the rows that a Gemm with a transposed weight makes."""
    node = None if value is None else value.producer()
    if node is None or not is_standard(node, "Gemm") or node.attributes.get_int("transB", 0) != 1:
        return None
    weight = node.inputs[1]
    return None if weight is None or weight.shape is None else static(weight.shape[0])


def _is_constant(shape: ir.Value | None) -> bool:
    return shape is None or shape.is_initializer()


def _pin(model: ir.Model, reshape: ir.Node, heads: int, head_dim: int) -> None:
    output = reshape.outputs[0]
    pin = ir.node("Reshape", [output, _constant(model, [0, 0, heads, head_dim])], name=f"{reshape.name}/static_heads")
    pinned = pin.outputs[0]
    pinned.name, pinned.type = f"{output.name}.static_heads", output.type
    for use in list(output.uses()):
        if use.node is not pin:
            use.node.replace_input_with(use.idx, pinned)
    model.graph.insert_after(reshape, pin)


def _constant(model: ir.Model, values: list[int]) -> ir.Value:
    """An int64 initialiser [n], one for each content."""
    name = "tensorrt_" + "_".join(str(value).replace("-", "minus") for value in values)
    if name not in model.graph.initializers:
        tensor = ir.tensor(np.array(values, dtype=np.int64), name=name)
        model.graph.initializers.add(
            ir.Value(
                name=name,
                shape=ir.Shape([len(values)]),
                type=ir.TensorType(ir.DataType.INT64),
                const_value=tensor,
            )
        )
    return model.graph.initializers[name]
