"""Helpers for nodes and values that several rewrites share."""

from collections.abc import Collection

import onnx_ir as ir

CONTRIB = "com.microsoft"


def sets_only(node: ir.Node, names: set[str]) -> bool:
    """Whether all attributes but `names` are zero, the default of those of Attention and RotaryEmbedding."""
    return all(name in names or attribute.value in (0, 0.0) for name, attribute in node.attributes.items())


def int_attribute(node: ir.Node, name: str) -> int:
    """0 where the node does not say."""
    attribute = node.attributes.get(name)
    return 0 if attribute is None else attribute.as_int()


def attention_scale(node: ir.Node, head_dim: int) -> float:
    """What an Attention multiplies its products by."""
    return float(node.attributes.get_float("scale", 0.0) or head_dim**-0.5)


def static_size(size: int | ir.SymbolicDim) -> int:
    assert isinstance(size, int)
    return size


def take_over(old: ir.Value, new: ir.Value, but: Collection[ir.Node] = ()) -> None:
    """`new` is used wherever `old` was, graph outputs and the name included; the nodes `but` keep reading `old`."""
    new.shape = new.shape or old.shape
    if new.dtype is None:
        copy_dtype(new, old)
    for use in list(old.uses()):
        if use.node not in but:
            use.node.replace_input_with(use.idx, new)
    if old.is_graph_output():
        outputs = old.graph.outputs  # type: ignore[union-attr]
        for i, output in enumerate(outputs):
            if output is old:
                outputs[i] = new
        new.name, old.name = old.name, f"{old.name}.inner"


def copy_dtype(new: ir.Value, old: ir.Value) -> None:
    """Not the type itself, an object that both values would share."""
    if old.dtype is not None:
        new.dtype = old.dtype
