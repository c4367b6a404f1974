"""A module written out for export -> an ONNX model without weights."""

import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import onnx_ir as ir
import torch
import torch.utils._pytree as pytree
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    IdentityEliminationPass,
    LiftConstantsToInitializersPass,
    RemoveUnusedFunctionsPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)
from torch import nn

from exporters.onnx.functions import OPSET, definitions
from exporters.onnx.lowering import translation_table

_SIZES = {"B": 2, "S": 3, "M": 5, "T": 4, "L": 6}
"""Sizes that vary, in examples: all different, and none is 1, which torch.export would take for a constant."""


@dataclass(frozen=True)
class Placeholder:
    """An input of a module that is traced: an example without values, and which of its axes vary."""

    tensor: torch.Tensor
    dims: dict[int, Any]


def placeholder(*shape: int | str, dtype: torch.dtype) -> Placeholder:
    """Axes given by name vary: B rows, S tokens, M visual tokens, T selected logits, L
    hidden states that a query is built of."""
    sizes = [_SIZES[size] if isinstance(size, str) else size for size in shape]
    dims = {axis: torch.export.Dim(name) for axis, name in enumerate(shape) if isinstance(name, str)}
    return Placeholder(torch.empty(sizes, dtype=dtype, device="meta"), dims)


@dataclass(frozen=True)
class Program:
    """A module written out for export, on the meta device, and what its graph is called with."""

    module: nn.Module
    example: Mapping[str, Any]
    """Keywords of the module's forward: tensors, or lists, tuples and dicts of them."""
    dynamic_shapes: Mapping[str, Any]
    """The same structure, with `{axis: Dim}` or None for each tensor."""
    input_names: Sequence[str]
    output_names: Sequence[str]
    constants: Mapping[str, torch.Tensor]
    """Values of the buffers that no checkpoint holds, by name, on the CPU."""

    @classmethod
    def of(
        cls,
        module: nn.Module,
        inputs: Mapping[str, Any],
        output_names: Sequence[str],
        input_names: Sequence[str] | None = None,
        constants: Mapping[str, torch.Tensor] | None = None,
    ) -> Self:
        """From Placeholders, by keyword; `input_names` where a keyword is a structure of them."""
        leaf: Any = {"is_leaf": lambda node: isinstance(node, Placeholder)}
        # a tensor of its own for each input: torch.export takes one tensor in two places for one input
        example = pytree.tree_map(lambda p: torch.empty_like(p.tensor), dict(inputs), **leaf)
        dims = pytree.tree_map(lambda p: p.dims, dict(inputs), **leaf)
        return cls(module, example, dims, input_names or list(inputs), output_names, constants or {})

    def trace(self) -> ir.Model:
        """The module's graph. Initialisers bear the module's parameter names; those in `constants` have values."""
        model = trace(self.module, self.example, self.dynamic_shapes, self.input_names, self.output_names)
        for name, value in self.constants.items():
            model.graph.initializers[name].const_value = ir.tensor(value.numpy(), name=name)
        return model


def parameter_names(module: nn.Module, model: nn.Module) -> dict[str, str]:
    """The parameter names of a module that is made of a model's submodules -> the model's own names of them."""
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), name)
    return {name: names[id(parameter)] for name, parameter in module.named_parameters(remove_duplicate=False)}


def trace(
    module: nn.Module,
    example: Mapping[str, Any],
    dynamic_shapes: Mapping[str, Any],
    input_names: Sequence[str],
    output_names: Sequence[str],
) -> ir.Model:
    """Trace `module(**example)` into an opset-24 graph.

    `module` and `example` are on the meta device: no weight is needed, and none is in the result. Its initialisers
    bear the module's parameter and buffer names and are bound to values by `weights.py`. `example` and
    `dynamic_shapes` are what `torch.export.export` takes as keywords; the names of the `Dim`s become the graph's
    symbolic dimensions. `input_names` and `output_names` name the flattened inputs and outputs, in order.
    """
    with torch.no_grad(), _quiet():
        exported = torch.export.export(
            module.eval(), (), dict(example), dynamic_shapes=dict(dynamic_shapes), strict=False
        )
        program = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            custom_translation_table=translation_table(),
        )
        assert program is not None
        model = program.model
        for value in model.graph.initializers.values():
            value.const_value = None  # a meta tensor, which nothing may ask for its values
        _name_dimensions(model, example, dynamic_shapes)
        for function in definitions():
            model.functions[function.identifier()] = function
        clean(model)
    for value in _values(model.graph):
        if value.name in {*input_names, *output_names}:
            value.name = f"{value.name}_"  # a name that the exporter gave, and that is wanted for another value
    for values, names in ((model.graph.inputs, input_names), (model.graph.outputs, output_names)):
        for value, name in zip(values, names, strict=True):
            value.name = name
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """These libraries warn about their own internals; what concerns the user is raised."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch.fx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _name_dimensions(model: ir.Model, example: Any, dynamic_shapes: Any) -> None:
    """Give the symbolic dimensions the names of the `Dim`s they came from (`s77` -> `S`), in expressions too."""
    names: dict[str, str] = {}
    for value, dims in zip(model.graph.inputs, _leaves(example, dynamic_shapes), strict=True):
        assert value.shape is not None
        for axis, dim in (dims or {}).items():
            root = getattr(dim, "root", dim)  # a derived dimension, such as 4 * M, is an expression of its root
            for symbol in _SYMBOL.findall(str(value.shape[axis])):
                names[symbol] = root.__name__
    for value in _values(model.graph):
        if value.shape is not None and not value.shape.is_static():
            value.shape = ir.Shape(
                dim if isinstance(dim, int) else _SYMBOL.sub(lambda m: names.get(m[0], m[0]), str(dim))
                for dim in value.shape
            )


_SYMBOL = re.compile(r"[A-Za-z_]\w*")


def _leaves(example: Any, dims: Any) -> Iterator[Any]:
    """The entry of `dynamic_shapes` for each tensor of the example, in the order in which they are graph inputs."""
    if isinstance(example, torch.Tensor):
        yield dims
    elif isinstance(example, Mapping):
        for key in example:
            yield from _leaves(example[key], dims[key])
    else:
        for child, child_dims in zip(example, dims, strict=True):
            yield from _leaves(child, child_dims)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def clean(model: ir.Model) -> None:
    """Remove what the exporter left: stack traces, dead and double nodes, unused outputs."""
    for node in model.graph:
        if node.op_type == "Attention":
            # TensorRT takes it with one output only
            node.resize_outputs(1)
    passes = ir.passes.Sequential(
        ClearMetadataAndDocStringPass(),
        IdentityEliminationPass(),
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=1),
        DeduplicateInitializersPass(),
        CommonSubexpressionEliminationPass(),
        RemoveUnusedNodesPass(),
        RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        RemoveUnusedOpsetsPass(),
    )
    with _quiet():
        passes(model)
    model.doc_string = None
