"""Where in a model a value of a graph is: its layer, and the operator that makes it."""

import re
from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True)
class ValueOrigin:
    """`layer` by the model's names, such as model.visual.blocks.3; `operator`, such as `Mul after mlp.up_proj`."""

    layer: str
    operator: str


def value_origins(graph: ir.Graph) -> dict[str, ValueOrigin]:
    """The origin of every value that a node of a graph computes, by name. A layer is identified by the parameter that
    was read last."""
    origins: dict[str, ValueOrigin] = {}
    nearest: dict[ir.Value, tuple[int, str]] = {}
    """Value -> where in the graph its last parameter was read, and the module that the parameter is of."""
    for number, node in enumerate(graph):
        nearest_of_inputs = [nearest[value] for value in node.inputs if value in nearest]
        own = [
            str(value.name).rpartition(".")[0] for value in node.inputs if value is not None and _is_parameter(value)
        ]
        reached = max(nearest_of_inputs, default=None)
        # a gate or scale of a whole layer says less about the place than what it is applied to
        own = [module for module in own if reached is None or not reached[1].startswith(f"{module}.")]
        if own:
            reached = (number, own[0])
        for value in node.outputs:
            origins[str(value.name)] = _origin(node.op_type, reached and reached[1], own=bool(own))
            if reached is not None:
                nearest[value] = reached
    return origins


def _is_parameter(value: ir.Value) -> bool:
    return isinstance(value.const_value, ir.ExternalTensor)


_NUMBERED = re.compile(r"(.*?\.\d+)(?:\.(.+))?")


def _origin(op_type: str, module: str | None, own: bool) -> ValueOrigin:
    if module is None:
        return ValueOrigin("inputs", op_type)
    numbered = _NUMBERED.fullmatch(module)
    layer, within_layer = (numbered[1], numbered[2] or "") if numbered else (module, "")
    if not within_layer:
        return ValueOrigin(layer, op_type)
    return ValueOrigin(layer, f"{op_type} {within_layer}" if own else f"{op_type} after {within_layer}")
