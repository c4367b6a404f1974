"""Masks over a memory as numbers that are added."""

import ml_dtypes
import numpy as np
import onnx_ir as ir

from exporters.onnx.rewrite import Rewrite, is_standard

_LOWEST: dict[ir.DataType, np.ndarray] = {
    ir.DataType.FLOAT: np.array(np.finfo(np.float32).min, dtype=np.float32),
    ir.DataType.FLOAT16: np.array(np.finfo(np.float16).min, dtype=np.float16),
    ir.DataType.BFLOAT16: np.array(-3.3895313892515355e38, dtype=ml_dtypes.bfloat16),
}


class AdditiveMask(Rewrite):
    """A bool mask of an Attention over something other than the key/value cache -> 0 where it is seen, the lowest
    finite number where it is not.

    From a bool mask over memory of any length TensorRT for RTX makes a list of the slots that are seen, with a
    cumulative sum and a copy from the host, in front of the very same attention kernel; an added mask it reads as it
    is. The mask over the cache, which is a comparison of positions, it recognises.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        self.replaced = 0
        additive_masks: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        for node in list(model.graph):
            if not is_standard(node, "Attention") or len(node.inputs) < 4:
                continue
            keys, mask = node.inputs[1], node.inputs[3]
            if keys is None or mask is None or not _is_bool(mask) or is_standard(keys.producer(), "TensorScatter"):
                continue
            dtype = keys.dtype or _dtype_of(node)
            if dtype not in _LOWEST:
                continue
            if (mask, dtype) not in additive_masks:
                additive_masks[mask, dtype] = _additive(model, node, mask, dtype)
            node.replace_input_with(3, additive_masks[mask, dtype])
            self.replaced += 1
        return ir.passes.PassResult(model, modified=self.replaced > 0)


_BOOL = ("Or", "And", "Not", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal")
_KEEPS_DTYPE = ("Expand", "Reshape", "Unsqueeze", "Transpose")


def _is_bool(value: ir.Value | None) -> bool:
    """By its type, or where inlining left it without one, by the operator that computes it."""
    while value is not None:
        if value.dtype is not None:
            return value.dtype == ir.DataType.BOOL
        node = value.producer()
        if node is None or node.domain not in ("", "ai.onnx"):
            return False
        if node.op_type in _BOOL:
            return True
        value = node.inputs[0] if node.op_type in _KEEPS_DTYPE else None
    return False


def _dtype_of(node: ir.Node) -> ir.DataType | None:
    return next((value.dtype for value in (*node.inputs[:3], *node.outputs) if value is not None and value.dtype), None)


def _additive(model: ir.Model, node: ir.Node, mask: ir.Value, dtype: ir.DataType) -> ir.Value:
    lowest = _LOWEST[dtype]
    zero, low = _scalar(model, "zero", np.zeros_like(lowest)), _scalar(model, "lowest", lowest)
    where = ir.node("Where", [mask, zero, low], name=f"{node.name}/additive_mask")
    bias = where.outputs[0]
    bias.name, bias.dtype, bias.shape = f"{mask.name}.additive", dtype, mask.shape
    model.graph.insert_before(node, where)
    return bias


def _scalar(model: ir.Model, kind: str, value: np.ndarray) -> ir.Value:
    name = f"tensorrt_{kind}_{value.dtype}"
    if name not in model.graph.initializers:
        tensor = ir.tensor(value, name=name)
        model.graph.initializers.add(
            ir.Value(name=name, shape=ir.Shape([]), type=ir.TensorType(tensor.dtype), const_value=tensor)
        )
    return model.graph.initializers[name]
