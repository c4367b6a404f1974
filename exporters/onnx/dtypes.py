"""ONNX's element types by the names that manifests and kernels call them."""

import onnx_ir as ir
import torch

from surgeon.dtypes import PRECISIONS, name_of

IR_DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "int32": ir.DataType.INT32,
    "int64": ir.DataType.INT64,
    "bool": ir.DataType.BOOL,
}
NAMES = {dtype: name for name, dtype in IR_DTYPES.items()}
_FLOATS = {IR_DTYPES[name_of(dtype)]: dtype for dtype in PRECISIONS.values()}


def ir_dtype(dtype: torch.dtype) -> ir.DataType:
    """Raises KeyError for one that no bundle has."""
    return IR_DTYPES[name_of(dtype)]


def torch_dtype(dtype: ir.DataType) -> torch.dtype:
    """Of a weight. Raises KeyError for one that no weight has."""
    return _FLOATS[dtype]
