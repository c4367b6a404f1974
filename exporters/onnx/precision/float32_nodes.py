"""Nodes of an fp16 or bf16 graph that compute in fp32: casts around them, the weights left where they are."""

from collections.abc import Collection, Iterable

import onnx_ir as ir

REDUCED = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

MOVES_DATA = frozenset(
    (
        "Concat",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Pad",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "TensorScatter",
        "Transpose",
        "Unsqueeze",
        "Where",
    )
)
"""Operators whose results are numbers that were there before."""


def compute_in_float32(
    graph: ir.Graph,
    nodes: Iterable[ir.Node],
    wide: Collection[ir.Value] = (),
    reduced: Collection[ir.DataType] = REDUCED,
) -> int:
    """Make `nodes`, given in the graph's order, compute in fp32; -> how many of them had something to change.

    What they read in a dtype of `reduced` is cast up, what they write in one is cast down again, except the values in
    `wide`: those become fp32, and whoever reads one is among `nodes`. A weight is cast where it is used, so that its
    initialiser points where it pointed.
    """
    raised: dict[ir.Value, ir.Value] = {}
    changed = 0
    for node in nodes:
        touched = False
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in reduced:
                if value not in raised:
                    raised[value] = _cast(value, ir.DataType.FLOAT, f"{value.name}.fp32")
                    graph.insert_before(node, raised[value].producer())  # type: ignore[arg-type]
                node.replace_input_with(index, raised[value])
                touched = True
        for value in node.outputs:
            if value.dtype not in reduced:
                continue
            touched = True
            if value not in wide:
                _lower(graph, node, value)
            value.dtype = ir.DataType.FLOAT
        changed += touched
    return changed


def _lower(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """A Cast back to its dtype behind `value`, which takes over its name and its readers."""
    assert value.dtype is not None
    name = value.name
    value.name = f"{name}.wide"
    lowered = _cast(value, value.dtype, str(name))
    cast = lowered.producer()
    assert cast is not None
    graph.insert_after(node, cast)
    for user, index in list(value.uses()):
        if user is not cast:
            user.replace_input_with(index, lowered)
    for index, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[index] = lowered


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
    node = ir.node("Cast", [value], {"to": int(dtype)}, name=f"cast_{name}")
    output = node.outputs[0]
    output.name, output.shape, output.dtype = name, value.shape, dtype
    return output
