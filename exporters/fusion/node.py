"""A chain of kernels as nodes of a graph: what each reads and writes, how large, and its launches compiled."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters.fusion import FORMAT
from exporters.fusion.formula import Size, formula
from exporters.kernels.aot import Job, compile_launches
from exporters.kernels.kernel import Chain, Step, TileConfig
from exporters.kernels.plan import ChooseTileConfig, Launch, TensorType, fixed_tile_configs, heuristic, plan, plan_step
from exporters.kernels.tile_config import DECODE_TOKENS, FEW_TOKENS

_SPLITS_MEMORY = 512 << 20
"""Bytes that one attention may leave behind at the largest sizes: all variants of it share its number of splits."""
_ITEMSIZE = {"float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "bool": 1}


@dataclass(frozen=True)
class VariantSpec:
    """Up to how many tokens a variant is taken, and the sizes of the graph's symbols that it is cut for."""

    tokens: int | None
    """None: for all that is left."""
    sizes: Mapping[str, int]


def variant_specs(symbols: Iterable[str], tokens: int, slots: int) -> list[VariantSpec]:
    """The variants for requests of up to so many tokens, or about so many where nothing says: for one token or few,
    some, many. `symbols`: the graph's; `slots`: the visual tokens that a memory usually holds.

    The limits are those at which `heuristic_tile_config` changes its choice.
    """
    specs = []
    for limit, length in ((DECODE_TOKENS, 1), (FEW_TOKENS, min(FEW_TOKENS, tokens)), (None, tokens)):
        last = limit is None or tokens <= limit
        sizes = {**dict.fromkeys(symbols, 1), "B": 1, "S": length, "M": slots}
        specs.append(VariantSpec(None if last else limit, sizes))
        if last:
            break
    return specs


@dataclass(frozen=True)
class KernelVariant:
    tokens: int | None
    launch: Launch
    """Its sizes are formulas of the node's inputs."""


@dataclass(frozen=True)
class KernelNode:
    """One step of a chain. Its inputs are those of the kernel that are there, in the kernel's order."""

    step: Step
    inputs: tuple[TensorType, ...]
    """As in the graph: a dimension is a number or a symbol."""
    outputs: tuple[TensorType, ...]
    variants: tuple[KernelVariant, ...]

    @property
    def described(self) -> dict[str, Any]:
        """Its description, JSON, without the compiled kernels. Layers that are alike have the same one."""
        launch = self.variants[0].launch
        return {
            "format": FORMAT,
            "kernel": self.step.kernel.name,
            "inputs": [tensor.dtype for tensor in self.inputs],
            "outputs": [
                {"dtype": tensor.dtype, "shape": [formula(size) for size in tensor.shape]}
                for tensor in launch.outputs.values()
            ],
            "sizes": [formula(size) for size in launch.sizes.values()],
            "variants": [
                {
                    "tokens": variant.tokens,
                    "grid": [formula(size) for size in variant.launch.grid],
                    "constants": variant.launch.constants,
                    "tile_config": dataclasses.asdict(variant.launch.tile_config),
                }
                for variant in self.variants
            ],
        }

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self.described, sort_keys=True).encode()).hexdigest()


def plan_nodes(
    chain: Chain,
    chain_inputs: Mapping[str, TensorType],
    variants: Sequence[VariantSpec],
    most: Mapping[str, int],
    choose: ChooseTileConfig = heuristic,
) -> list[KernelNode]:
    """One node for each step of a chain. `chain_inputs`: the chain's inputs by name, without those that are None. A
    dimension is a number or a symbol of `most`, which has the largest size of each symbol.

    All variants split the memory alike: attention chooses its variant by a row's tokens, what reads its splits by all
    rows'.
    """
    tile_configs = _tile_configs(chain, chain_inputs, variants[0].sizes, choose)
    splits = {
        name: _splits(chain, chain_inputs, most, name, tile_configs[name].splits, choose) for name in tile_configs
    }

    def alike(step: Step, inputs: Mapping[str, TensorType]) -> TileConfig:
        return dataclasses.replace(choose(step, inputs), splits=splits[step.name])

    cut = [_tile_configs(chain, chain_inputs, variant.sizes, alike) for variant in variants]
    values, nodes = dict(chain_inputs), []
    for step in chain.steps:
        step_inputs = {
            name: values[step.inputs[name]] for name in step.kernel.inputs if step.inputs.get(name) in values
        }
        symbolic = {name: _referring(tensor, place) for place, (name, tensor) in enumerate(step_inputs.items())}
        launches = [plan_step(step, symbolic, fixed_tile_configs(tile_config)) for tile_config in cut]
        inputs = tuple(step_inputs.values())
        outputs = {name: _named(tensor, inputs) for name, tensor in launches[0].outputs.items()}
        node_variants = tuple(
            KernelVariant(variant.tokens, launch) for variant, launch in zip(variants, launches, strict=True)
        )
        nodes.append(KernelNode(step, inputs, tuple(outputs.values()), node_variants))
        values |= {value: outputs[name] for name, value in step.outputs.items()}
    return nodes


def compile_nodes(
    nodes: Mapping[str, KernelNode], capabilities: Sequence[int], cache: Path | None = None, *, aligned: bool = True
) -> dict[str, dict[str, Any]]:
    """The description of every node for a runtime, JSON, with its kernels for each compute capability. `cache`: a
    folder to keep compiled kernels in; `aligned`: whether the runtime places every tensor at a multiple of 16 bytes.

    Raises CompileError for a kernel that does not compile.
    """
    jobs = [
        (name, number, Job(variant.launch, capability, aligned))
        for name, node in nodes.items()
        for number, variant in enumerate(node.variants)
        for capability in capabilities
    ]
    descriptions = {name: node.described for name, node in nodes.items()}
    for description in descriptions.values():
        for variant in description["variants"]:
            variant["kernels"] = []
    compiled = compile_launches([job for _, _, job in jobs], cache, fit=True)
    for (name, number, _), kernel in zip(jobs, compiled, strict=True):
        kinds = [parameter.kind for parameter in kernel.parameters]
        assert kinds == sorted(kinds, key=("input", "size", "output").index), "they are passed in this order"
        descriptions[name]["variants"][number]["kernels"].append(
            {
                "capability": kernel.capability,
                "entry": kernel.entry,
                "ptx": kernel.ptx,
                "shared": kernel.shared,
                "num_warps": kernel.num_warps,
            }
        )
    return descriptions


def _concrete(chain_inputs: Mapping[str, TensorType], sizes: Mapping[str, int]) -> dict[str, TensorType]:
    return {
        name: TensorType(tuple(size if isinstance(size, int) else sizes[size] for size in tensor.shape), tensor.dtype)
        for name, tensor in chain_inputs.items()
    }


def _tile_configs(
    chain: Chain, chain_inputs: Mapping[str, TensorType], sizes: Mapping[str, int], choose: ChooseTileConfig
) -> dict[str, TileConfig]:
    return {launch.step.name: launch.tile_config for launch in plan(chain, _concrete(chain_inputs, sizes), choose)}


def _splits(
    chain: Chain,
    chain_inputs: Mapping[str, TensorType],
    most: Mapping[str, int],
    name: str,
    splits: int,
    choose: ChooseTileConfig,
) -> int:
    """As many as decoding asks for, unless what they leave behind at the largest sizes would not fit."""
    if splits == 1:
        return 1

    def single(step: Step, inputs: Mapping[str, TensorType]) -> TileConfig:
        return dataclasses.replace(choose(step, inputs), splits=1)

    launch = next(
        planned for planned in plan(chain, _concrete(chain_inputs, most), single) if planned.step.name == name
    )
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
