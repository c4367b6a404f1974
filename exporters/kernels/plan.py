"""What the launches of a chain are for given tensors: shapes, dtypes, constants, grids. No tensor and no GPU is needed.

Shapes may hold symbolic sizes where a kernel takes them as numbers at launch: batch, length and slots.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from exporters.kernels.kernel import Chain, Dim, Shape, Step, TileConfig
from exporters.kernels.tile_config import heuristic_tile_config


@dataclass(frozen=True)
class TensorType:
    shape: Shape
    dtype: str
    """Of torch: "bfloat16"."""


@dataclass(frozen=True)
class Launch:
    """One step of a chain with everything decided."""

    step: Step
    tile_config: TileConfig
    inputs: dict[str, TensorType]
    """By kernel input; those that are None are not there."""
    outputs: dict[str, TensorType]
    """By kernel output, in the kernel's order."""
    sizes: dict[str, Dim]
    """The int32 arguments, in the kernel's order."""
    constants: dict[str, Any]
    grid: tuple[Dim, Dim, Dim]

    def with_fewer_stages(self) -> "Launch":
        """The same in less shared memory: nothing but the compiled code depends on the stages."""
        return replace(self, tile_config=replace(self.tile_config, num_stages=self.tile_config.num_stages - 1))


ChooseTileConfig = Callable[[Step, Mapping[str, TensorType]], TileConfig]


def heuristic(step: Step, inputs: Mapping[str, TensorType]) -> TileConfig:
    shapes = {name: tensor.shape for name, tensor in inputs.items()}
    return heuristic_tile_config(step.kernel, shapes, element_size(inputs))


def fixed_tile_configs(tile_configs: Mapping[str, TileConfig]) -> ChooseTileConfig:
    """By the names of steps, and the heuristic's for the rest."""
    return lambda step, inputs: tile_configs.get(step.name) or heuristic(step, inputs)


def element_size(inputs: Mapping[str, TensorType]) -> int:
    """Bytes of an element of the weights, or of the memory, that a kernel reads."""
    tensor = next(inputs[name] for name in ("weight", "gate_weight", "keys") if name in inputs)
    return 4 if tensor.dtype == "float32" else 2


def plan_step(step: Step, inputs: Mapping[str, TensorType], choose: ChooseTileConfig = heuristic) -> Launch:
    """`inputs`: by kernel input, those that are there."""
    kernel = step.kernel
    shapes = {name: tensor.shape for name, tensor in inputs.items()}
    tile_config = choose(step, inputs)
    return Launch(
        step=step,
        tile_config=tile_config,
        inputs=dict(inputs),
        outputs={
            name: TensorType(output.shape, inputs[output.dtype].dtype if output.dtype in inputs else output.dtype)
            for name, output in kernel.outputs(shapes, step.options, tile_config).items()
        },
        sizes=kernel.sizes(shapes),
        constants=kernel.constants(shapes, step.options, tile_config),
        grid=kernel.grid(shapes, step.options, tile_config),
    )


def plan(chain: Chain, tensors: Mapping[str, TensorType], choose: ChooseTileConfig = heuristic) -> list[Launch]:
    """Every launch of a chain. `tensors`: its inputs by name, without those that are None."""
    values = dict(tensors)
    launches = []
    for step in chain.steps:
        inputs = {name: values[value] for name, value in step.inputs.items() if value in values}
        launches.append(plan_step(step, inputs, choose))
        values |= {value: launches[-1].outputs[name] for name, value in step.outputs.items()}
    return launches
