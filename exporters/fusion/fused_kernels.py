"""The grafts' functions as chains of nodes, one for each launch of their fused kernels."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedFunctionsPass

from exporters.fusion import NAMESPACE, VERSION
from exporters.fusion.node import KernelNode, VariantSpec, plan_nodes
from exporters.kernels.kernel import Chain, chains_of
from exporters.kernels.plan import ChooseTileConfig, TensorType, heuristic
from exporters.kernels.support import reason_against
from exporters.onnx.dtypes import IR_DTYPES, NAMES
from exporters.onnx.functions import DOMAIN, registry
from exporters.onnx.rewrite import Rewrite, is_standard, static

_RESIDUAL = "residual"
"""The chain's input that its result is added to."""


@cache
def chains() -> dict[str, Callable[[float], Chain]]:
    """By the name of a graft's function, whose inputs are those of its chain, in the same order."""
    graft_chains = {graft_function.function.name: chains_of(kind) for kind, graft_function in registry().items()}
    return {name: chains.attend for name, chains in graft_chains.items() if chains is not None}


class FusedKernels(Rewrite):
    """Every call of a graft's function -> nodes of the domain "surgeon", named `<the call's name>/<the step's name>`.
    An Add that alone reads the result of a chain that can do that itself becomes part of it.

    It runs before functions are written out. A call that the kernels do not support stays; a warning gives
    each reason once.
    """

    def __init__(
        self,
        variants: Sequence[VariantSpec],
        most: Mapping[str, int],
        choose: ChooseTileConfig = heuristic,
        attributes: Mapping[str, str] | None = None,
    ) -> None:
        """`variants`: what launches are cut for; `most`: every symbol of the graph at its largest; `attributes`:
        those that the runtime requires of every node."""
        self.variants, self.most, self.choose = variants, most, choose
        self.attributes = dict(attributes or {})
        self.nodes: dict[str, KernelNode] = {}
        """By operator: a step's name, and its number where the layers' steps of that name are not alike."""
        self.functions: dict[str, int] = {}
        """How many calls of each function were replaced."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        self.replaced = 0
        warned: set[str] = set()
        for node in list(model.graph):
            if node.domain != DOMAIN or node.op_type not in chains():
                continue
            chain = chains()[node.op_type](node.attributes.get_float("eps", 0.0))
            reason = self._reason_against(chain, node)
            if reason is not None:
                if reason not in warned:
                    warnings.warn(f"{reason}; standard operators stay", stacklevel=1)
                warned.add(reason)
                continue
            self._replace(model, node, chain)
            self.functions[node.op_type] = self.functions.get(node.op_type, 0) + 1
            self.replaced += 1
        if self.replaced:
            RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]  # onnx-ir's, without annotations
            model.graph.opset_imports[NAMESPACE] = int(VERSION)
        return ir.passes.PassResult(model, modified=self.replaced > 0)

    def _reason_against(self, chain: Chain, node: ir.Node) -> str | None:
        inputs = dict(zip(chain.inputs, node.inputs, strict=False))
        dtypes = set()
        for name, value in inputs.items():
            if value is None or value.shape is None or value.dtype not in NAMES:
                return f"{chain.name}: no fused kernel where the graph does not say shape and dtype of {name}"
            if unknown := [size for size in value.shape if static(size) is None and str(size) not in self.most]:
                return f"{chain.name}: no fused kernel for {name} with a dimension {unknown[0]}, which has no range"
            if name not in ("memory_mask", "visual_token_mask", "cos", "sin"):
                dtypes.add(getattr(torch, NAMES[value.dtype]))
        keys = inputs["keys"]
        assert keys is not None and keys.shape is not None
        head_dim = static(keys.shape[3])
        if head_dim is None:
            return f"{chain.name}: no fused kernel where the graph does not say its head_dim"
        return reason_against(chain.name, head_dim, dtypes)

    def _replace(self, model: ir.Model, node: ir.Node, chain: Chain) -> None:
        values = {name: value for name, value in zip(chain.inputs, node.inputs, strict=False) if value is not None}
        last = node
        if _RESIDUAL in chain.inputs and (add := _sum_of(node.outputs[0])) is not None:
            a, b = add.inputs
            values[_RESIDUAL] = b if a is node.outputs[0] else a  # type: ignore[assignment]  # both are there
            last = add
        types = {name: _type_of(value) for name, value in values.items()}
        for planned in plan_nodes(chain, types, self.variants, self.most, self.choose):
            step = planned.step
            inputs = [values[step.inputs[name]] for name in step.kernel.inputs if step.inputs.get(name) in values]
            outputs = [
                ir.Value(
                    name=f"{node.name}/{value}",
                    shape=ir.Shape(tensor.shape),
                    type=ir.TensorType(IR_DTYPES[tensor.dtype]),
                )
                for value, tensor in zip(step.outputs.values(), planned.outputs, strict=True)
            ]
            values |= dict(zip(step.outputs.values(), outputs, strict=True))
            kernel_node = ir.node(
                self._operator(planned),
                inputs,
                attributes=self.attributes,
                domain=NAMESPACE,
                outputs=outputs,
                name=f"{node.name}/{step.name}",
            )
            model.graph.insert_before(last, kernel_node)
        (result,) = chain.outputs
        _take_over(model, last.outputs[0], values[result])
        model.graph.remove(last, safe=True)
        if last is not node:
            model.graph.remove(node, safe=True)

    def _operator(self, node: KernelNode) -> str:
        """Under which name it is known: layers that are alike share it."""
        number = 1
        while True:
            name = node.step.name if number == 1 else f"{node.step.name}_{number}"
            if self.nodes.setdefault(name, node).key == node.key:
                return name
            number += 1


def _type_of(value: ir.Value) -> TensorType:
    assert value.shape is not None and value.dtype is not None
    shape = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
    return TensorType(shape, NAMES[value.dtype])


def _sum_of(value: ir.Value) -> ir.Node | None:
    """The Add of two tensors of one shape that alone reads a value."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output() or not is_standard(uses[0].node, "Add"):
        return None
    a, b = uses[0].node.inputs
    assert a is not None and b is not None
    return uses[0].node if a.shape == b.shape and a.dtype == b.dtype else None


def _take_over(model: ir.Model, old: ir.Value, new: ir.Value) -> None:
    """`new` in the place of `old`, under its name."""
    name = old.name
    for use in list(old.uses()):
        use.node.replace_input_with(use.idx, new)
    for place, output in enumerate(model.graph.outputs):
        if output is old:
            model.graph.outputs[place] = new
    old.name, new.name = f"{name}.replaced", name
