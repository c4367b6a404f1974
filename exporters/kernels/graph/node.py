"""A chain of kernels as nodes of a graph: what each reads and writes, how large, and its launches compiled."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters.kernels.aot import Job, compile_launches
from exporters.kernels.graph import FORMAT
from exporters.kernels.graph.formula import Size, formula
from exporters.kernels.kernel import Blocks, Chain, Step
from exporters.kernels.plan import ChooseBlocks, Launch, TensorType, by_rule, fixed_blocks, plan, plan_step

_SPLITS_MEMORY = 512 << 20
"""Bytes that one attention may leave behind at the largest sizes: all forms of it share its number of splits."""
_ITEMSIZE = {"float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "bool": 1}


@dataclass(frozen=True)
class Reach:
    """Up to how many tokens a form is taken, and the sizes of the graph's symbols that it is cut for."""

    tokens: int | None
    """None: for all that is left."""
    sizes: Mapping[str, int]


@dataclass(frozen=True)
class Form:
    tokens: int | None
    launch: Launch
    """Its sizes are formulas of the node's inputs."""


@dataclass(frozen=True)
class KernelNode:
    """One step of a chain. Its inputs are those of the kernel that are there, in the kernel's order."""

    step: Step
    inputs: tuple[TensorType, ...]
    """As in the graph: a dimension is a number, a symbol, or None where forms differ in it."""
    outputs: tuple[TensorType, ...]
    forms: tuple[Form, ...]

    @property
    def described(self) -> dict[str, Any]:
        """What it is, JSON, but for its compiled kernels. Layers that are alike have the same."""
        launch = self.forms[0].launch
        shapes = [[[formula(n) for n in out.shape] for out in form.launch.outputs.values()] for form in self.forms]
        return {
            "format": FORMAT,
            "kernel": self.step.kernel.name,
            "inputs": [tensor.dtype for tensor in self.inputs],
            "outputs": [
                {"dtype": tensor.dtype, "shape": shape}
                for tensor, shape in zip(launch.outputs.values(), shapes[0], strict=True)
            ],
            "sizes": [formula(size) for size in launch.sizes.values()],
            "forms": [
                {
                    "tokens": form.tokens,
                    "grid": [formula(size) for size in form.launch.grid],
                    "constants": form.launch.constants,
                    "blocks": dataclasses.asdict(form.launch.blocks),
                }
                | ({} if own == shapes[0] else {"outputs": own})
                for form, own in zip(self.forms, shapes, strict=True)
            ],
        }

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self.described, sort_keys=True).encode()).hexdigest()


def plan_nodes(
    chain: Chain,
    given: Mapping[str, TensorType],
    forms: Sequence[Reach],
    most: Mapping[str, int] | None = None,
    choose: ChooseBlocks = by_rule,
) -> list[KernelNode]:
    """One node for each step of a chain. `given`: the chain's inputs by name, without those that are None; a dimension
    is a number or a symbol.

    `most`, the largest size of each symbol, is for runtimes that are told once how large outputs are, whichever form
    runs: all forms then split the memory alike. Without it each does as it is cut, and has shapes of its own.
    """
    cut = [_blocks(chain, given, form.sizes, choose) for form in forms]
    for name in cut[0] if most is not None else ():
        assert most is not None
        splits = _splits(chain, given, most, name, cut[0][name].splits, choose)
        for blocks in cut:
            blocks[name] = dataclasses.replace(blocks[name], splits=splits)
    values = [dict(given) for _ in forms]
    found = []
    for step in chain.steps:
        read = [step.inputs[name] for name in step.kernel.inputs if step.inputs.get(name) in values[0]]
        made = []
        for form, blocks, known in zip(forms, cut, values, strict=True):
            there = {name: known[step.inputs[name]] for name in step.kernel.inputs if step.inputs.get(name) in known}
            symbolic = {name: _referring(tensor, place) for place, (name, tensor) in enumerate(there.items())}
            launch = plan_step(step, symbolic, fixed_blocks(blocks))
            known |= {value: _named(launch.outputs[name], [*there.values()]) for name, value in step.outputs.items()}
            made.append(Form(form.tokens, launch))
        found.append(KernelNode(step, _common(read, values), _common(step.outputs.values(), values), tuple(made)))
    return found


def compile_nodes(
    nodes: Mapping[str, KernelNode], capabilities: Sequence[int], cache: Path | None = None, *, aligned: bool = True
) -> dict[str, dict[str, Any]]:
    """What a runtime is told of every node, JSON, with its kernels for each compute capability. `cache`: a folder to
    keep compiled kernels in; `aligned`: whether the runtime places every tensor at a multiple of 16 bytes.

    Raises CompileError for a kernel that does not compile.
    """
    jobs = [
        (name, number, Job(form.launch, capability, aligned))
        for name, node in nodes.items()
        for number, form in enumerate(node.forms)
        for capability in capabilities
    ]
    found = {name: node.described for name, node in nodes.items()}
    for described in found.values():
        for form in described["forms"]:
            form["kernels"] = []
    compiled = compile_launches([job for _, _, job in jobs], cache, fit=True)
    for (name, number, _), kernel in zip(jobs, compiled, strict=True):
        kinds = [parameter.kind for parameter in kernel.parameters]
        assert kinds == sorted(kinds, key=("input", "size", "output").index), "they are passed in this order"
        found[name]["forms"][number]["kernels"].append(
            {
                "capability": kernel.capability,
                "entry": kernel.entry,
                "ptx": kernel.ptx,
                "shared": kernel.shared,
                "num_warps": kernel.num_warps,
            }
        )
    return found


def _common(names: Iterable[str], values: Sequence[Mapping[str, TensorType]]) -> tuple[TensorType, ...]:
    """What all forms know of these values."""
    found = []
    for name in names:
        shapes = zip(*(known[name].shape for known in values), strict=True)
        found.append(TensorType(tuple(n[0] if len(set(n)) == 1 else None for n in shapes), values[0][name].dtype))
    return tuple(found)


def _concrete(given: Mapping[str, TensorType], sizes: Mapping[str, int]) -> dict[str, TensorType]:
    return {
        name: TensorType(tuple(size if isinstance(size, int) else sizes[size] for size in tensor.shape), tensor.dtype)
        for name, tensor in given.items()
    }


def _blocks(
    chain: Chain, given: Mapping[str, TensorType], sizes: Mapping[str, int], choose: ChooseBlocks
) -> dict[str, Blocks]:
    return {launch.step.name: launch.blocks for launch in plan(chain, _concrete(given, sizes), choose)}


def _splits(
    chain: Chain, given: Mapping[str, TensorType], most: Mapping[str, int], name: str, splits: int, choose: ChooseBlocks
) -> int:
    """As many as decoding asks for, unless what they leave behind at the largest sizes would not fit."""
    if splits == 1:
        return 1

    def single(step: Step, inputs: Mapping[str, TensorType]) -> Blocks:
        return dataclasses.replace(choose(step, inputs), splits=1)

    launch = next(each for each in plan(chain, _concrete(given, most), single) if each.step.name == name)
    size = sum(math.prod(tensor.shape) * _ITEMSIZE[tensor.dtype] for tensor in launch.outputs.values())
    while splits > 1 and size * splits > _SPLITS_MEMORY:
        splits //= 2
    return splits


def _referring(tensor: TensorType, place: int) -> TensorType:
    """An input with references to its dimensions in place of the graph's symbols."""
    shape = (size if isinstance(size, int) else Size.of(place, axis) for axis, size in enumerate(tensor.shape))
    return TensorType(tuple(shape), tensor.dtype)


def _named(tensor: TensorType, inputs: Sequence[TensorType]) -> TensorType:
    """With the graph's symbols in place of the references to inputs, which are all that kernels' outputs have."""
    shape = []
    for size in tensor.shape:
        if isinstance(size, Size):
            _, place, axis = size.formula
            size = inputs[place].shape[axis]
        shape.append(size)
    return TensorType(tuple(shape), tensor.dtype)
