"""Described kernel nodes as the native library reads them: the structures of library.c, laid out in memory."""

import ctypes
from collections.abc import Mapping
from typing import Any

from exporters.fusion import NAMESPACE
from exporters.fusion.formula import Formula

_KINDS = {"number": 0, "dim": 1, "+": 2, "*": 3, "//": 4}
_TYPES = {"float32": 1, "int32": 6, "bool": 9, "float16": 10, "bfloat16": 16}
"""ONNX Runtime's numbers of element types."""
_INPUTS, _OUTPUTS, _SIZES, _RANK, _DEPTH = 16, 4, 8, 8, 16
"""The limits of library.c."""


class _Formula(ctypes.Structure):
    _fields_ = (("words", ctypes.POINTER(ctypes.c_int64)), ("count", ctypes.c_int32))


class _Variant(ctypes.Structure):
    _fields_ = (
        ("tokens", ctypes.c_int64),
        ("grid", _Formula * 3),
        ("entry", ctypes.c_char_p),
        ("ptx", ctypes.c_char_p),
        ("threads", ctypes.c_uint32),
        ("shared", ctypes.c_uint32),
    )


class _Operator(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        *((name, ctypes.c_int32) for name in ("num_inputs", "num_outputs", "num_sizes")),
        *((name, ctypes.POINTER(ctypes.c_int32)) for name in ("input_types", "output_types", "output_ranks")),
        *((name, ctypes.POINTER(_Formula)) for name in ("sizes", "output_dims")),
        ("variants", ctypes.POINTER(_Variant)),
    )


class Table(ctypes.Structure):
    """What `surgeon_offer` takes; it lives as long as the sessions created with it."""

    _fields_ = (
        ("domain", ctypes.c_char_p),
        ("provider", ctypes.c_char_p),
        ("driver", ctypes.c_char_p),
        ("alignment", ctypes.c_int32),
        ("num_operators", ctypes.c_int32),
        ("operators", ctypes.POINTER(_Operator)),
    )


def table(descriptions: Mapping[str, dict[str, Any]], provider: str, driver: str, alignment: int) -> Table:
    """`descriptions`: those of `compile_nodes`, of each operator for one compute capability; `provider`: the execution
    provider that the operators belong to; `driver`: the file of CUDA's driver; `alignment`: bytes of which every
    address must be a multiple."""
    operators = [_operator(name, description) for name, description in descriptions.items()]
    return Table(
        NAMESPACE.encode(),
        provider.encode(),
        driver.encode(),
        alignment,
        len(operators),
        _array(_Operator, operators),
    )


def _operator(name: str, description: dict[str, Any]) -> _Operator:
    inputs, outputs, sizes = description["inputs"], description["outputs"], description["sizes"]
    assert len(inputs) <= _INPUTS and len(outputs) <= _OUTPUTS and len(sizes) <= _SIZES
    assert all(len(output["shape"]) <= _RANK for output in outputs)
    return _Operator(
        name.encode(),
        len(inputs),
        len(outputs),
        len(sizes),
        _array(ctypes.c_int32, [_TYPES[dtype] for dtype in inputs]),
        _array(ctypes.c_int32, [_TYPES[output["dtype"]] for output in outputs]),
        _array(ctypes.c_int32, [len(output["shape"]) for output in outputs]),
        _array(_Formula, map(_formula, sizes)),
        _array(_Formula, [_formula(size) for output in outputs for size in output["shape"]]),
        _array(_Variant, map(_variant, description["variants"])),
    )


def _variant(variant: dict[str, Any]) -> _Variant:
    (kernel,) = variant["kernels"]
    return _Variant(
        -1 if variant["tokens"] is None else variant["tokens"],
        (_Formula * 3)(*map(_formula, variant["grid"])),
        kernel["entry"].encode(),
        kernel["ptx"].encode(),
        32 * kernel["num_warps"],
        kernel["shared"],
    )


def _formula(formula: Formula) -> _Formula:
    words = _postfix(formula)
    assert len(words) <= 2 * _DEPTH
    return _Formula(_array(ctypes.c_int64, words), len(words) // 2)


def _postfix(formula: Formula) -> list[int]:
    if isinstance(formula, int):
        return [_KINDS["number"], formula]
    kind, a, b = formula
    if kind == "dim":
        return [_KINDS["dim"], 256 * a + b]
    return [*_postfix(a), *_postfix(b), _KINDS[kind], 0]


def _array(kind: Any, values: Any) -> Any:
    """Ctypes keeps what pointers in a structure point to for as long as the structure."""
    items = list(values)
    return (kind * len(items))(*items)
