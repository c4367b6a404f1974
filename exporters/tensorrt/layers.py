"""What became of the operators that matter: fused kernels, or primitives.

Without a driver no engine can be asked. But while it is built the library logs which layers the network has, and at
last which kernels the engine has, each with the ONNX nodes it came from.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir
from pydantic import BaseModel, ConfigDict

from exporters.tensorrt.errors import EngineError

LAYER_OF = {"Attention": "ATTENTION_OUTPUT", "TensorScatter": "KV_CACHE_UPDATE", "RotaryEmbedding": "ROTARY_EMBEDDING"}
"""Operators of the bundle's graphs -> the network layer that stands for the whole of one."""
REPORTED = sorted(LAYER_OF.values())
_ATTENTION_KERNEL = re.compile(r"mha|attention", re.IGNORECASE)
_KERNEL = re.compile(r"^Name: (?P<name>.+?), LayerType: (?P<type>[^,]+), .*?Metadata: ?(?P<metadata>.*)$", re.MULTILINE)
_NODE = re.compile(r"\[ONNX Layer: ([^\]|]+?)(?: \|[^\]]*)?\]")
_PART = re.compile(r"_(myl\d+)_\d+$")
_NUMBERS = re.compile(r"_myl\d+_\d+$|(?<=__fc)\d+|(?<=__mye)\d+(_\d+)?")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Operator(_Strict):
    """One node of the graph."""

    node: str
    operator: Literal["Attention", "TensorScatter", "RotaryEmbedding"]
    fused: bool
    kernels: list[str]
    """Engine kernels that it is in, over all profiles, without their numbers; what else they do, their names say.
    Empty where the library's log does not tell."""
    reason: str | None = None
    """Why it is not fused."""


class GraphLayers(_Strict):
    network: dict[str, int]
    """How many layers of each type the parser created."""
    kernels: int
    """Of the engine, over all profiles."""
    operators: list[Operator]

    def unfused(self, operator: str = "Attention") -> list[Operator]:
        return [entry for entry in self.operators if entry.operator == operator and not entry.fused]

    def count(self, operator: str) -> tuple[int, int]:
        """How many nodes are fused, and how many there are."""
        fused = [entry.fused for entry in self.operators if entry.operator == operator]
        return sum(fused), len(fused)


class LayerReport(_Strict):
    """The content of layers.json."""

    graphs: dict[str, GraphLayers]

    def warnings(self) -> list[str]:
        """One line for every graph whose attention is not all fused."""
        messages = []
        for name, graph in self.graphs.items():
            if apart := graph.unfused():
                nodes = [entry.node for entry in apart[:4]] + ["..."] * (len(apart) > 4)
                messages.append(
                    f"{name}: {len(apart)} of {graph.count('Attention')[1]} attention(s) fell apart into primitives: "
                    f"{', '.join(nodes)} ({apart[0].reason})"
                )
        return messages


def report(model: ir.Model, parsed: Mapping[str, Any], log: str) -> GraphLayers:
    """`model`: the graph that was built; `parsed`: the child's event of that name; `log`: the engine's layers as the
    library logged them, empty where it does not."""
    special = {(kind, node) for kind, name, metadata in parsed["special"] for node in _nodes(kind, name, metadata)}
    kernels: dict[str, list[str]] = {}
    logged_kernels = list(_KERNEL.finditer(log))
    for kernel in logged_kernels:
        for node in _NODE.findall(kernel["metadata"]):
            kernels.setdefault(node, []).append(kernel["name"])
    return GraphLayers(
        network=dict(parsed["kinds"]),
        kernels=len(logged_kernels),
        operators=[
            _operator(node, special, kernels.get(str(node.name), []), bool(logged_kernels))
            for node in model.graph
            if node.op_type in LAYER_OF and node.domain in ("", "ai.onnx")
        ],
    )


def _operator(node: ir.Node, special: Iterable[tuple[str, str]], kernels: list[str], logged: bool) -> Operator:
    name, reason = str(node.name), None
    if (LAYER_OF[node.op_type], name) not in special:
        reason = "the parser made primitives of it"
    elif node.op_type == "Attention" and logged and not _in_attention_kernels(kernels):
        reason = "the library has no attention kernel for its shapes and dtype"
    return Operator(
        node=name,
        operator=node.op_type,  # type: ignore[arg-type]  # one of LAYER_OF
        fused=reason is None,
        kernels=sorted({_NUMBERS.sub("", kernel) for kernel in kernels}),
        reason=reason,
    )


def _in_attention_kernels(kernels: Iterable[str]) -> bool:
    """Whether every part of the engine that an Attention's kernels are in has an attention kernel among them: each
    profile is compiled to a part of its own."""
    parts: dict[str, bool] = {}
    for kernel in kernels:
        part = _PART.search(kernel)
        where = "" if part is None else part[1]
        parts[where] = parts.get(where, False) or _ATTENTION_KERNEL.search(kernel) is not None
    return bool(parts) and all(parts.values())


def _nodes(kind: str, name: str, metadata: str) -> list[str]:
    """The ONNX nodes that a network layer came from: the metadata says, else its name does."""
    return _NODE.findall(metadata) or [name.removesuffix("_AttentionOutput")]


def load_report(path: Path) -> LayerReport:
    """Raises EngineError for what is no report."""
    try:
        return LayerReport.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineError(f"{path}: the layer report is damaged, build the engines again ({_first(error)})") from error


def _first(error: Exception) -> str:
    return str(error).splitlines()[0]
