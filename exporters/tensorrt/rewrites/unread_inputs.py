"""Inputs whose values nobody reads."""

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from exporters.onnx.rewrite import Rewrite, is_standard


class DropUnreadInputs(Rewrite):
    """A graph input of which the size alone is asked, or nothing -> no input; the size is that of another input's axis
    of the same symbol.

    A tracer asks any of the inputs for a size that several have. TensorRT says of such an input what it says of one
    that it does not understand, that it is unused, and that must stay an error.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        self.replaced = 0
        inputs = model.graph.inputs
        for value in [value for value in inputs if not _is_read(value) and not value.is_graph_output()]:
            moved = [(use.node, _axis_elsewhere(use.node, value, inputs)) for use in value.uses()]
            if any(where is None for _, where in moved):
                continue
            for node, where in moved:
                assert where is not None
                other, axis = where
                node.replace_input_with(0, other)
                node.attributes["start"] = ir.AttrInt64("start", axis)
                node.attributes["end"] = ir.AttrInt64("end", axis + 1)
            inputs.remove(value)
            self.replaced += 1
        return ir.passes.PassResult(model, modified=self.replaced > 0)


def _is_read(value: ir.Value) -> bool:
    return any(not is_standard(use.node, "Shape") for use in value.uses())


def _axis_elsewhere(shape: ir.Node, value: ir.Value, inputs: Sequence[ir.Value]) -> tuple[ir.Value, int] | None:
    """Where else the one size that `shape` gives is found; None where it gives several, or nowhere."""
    assert value.shape is not None
    rank = len(value.shape)
    start = _from_front(shape.attributes.get_int("start", 0), rank)
    if _from_front(shape.attributes.get_int("end", rank), rank) != start + 1:
        return None
    return next(_same(str(value.shape[start]), value, inputs), None)


def _from_front(axis: int, rank: int) -> int:
    return axis + rank if axis < 0 else axis


def _same(symbol: str, but: ir.Value, inputs: Sequence[ir.Value]) -> Iterator[tuple[ir.Value, int]]:
    for other in inputs:
        if other is but or other.shape is None or not _is_read(other):
            continue
        for axis, size in enumerate(other.shape):
            if not isinstance(size, int) and str(size) == symbol:
                yield other, axis
