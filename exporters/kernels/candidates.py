"""The ways of cutting a launch that are worth measuring, beside the rule's own. All are sound for any sizes."""

from collections.abc import Iterator, Mapping

from exporters.kernels.kernel import Kernel, Shape, Step, TileConfig, power_of_two
from exporters.kernels.tile_config import heuristic_tile_config

LEAST_SHARED_MEMORY = 99 << 10
"""Bytes of a block on the smallest of the GPUs from compute capability 8.0 on."""
_REGISTERS = 64
"""fp32 elements of a tile for each thread, at most: more spill."""


def candidates(
    step: Step, shapes: Mapping[str, Shape], element_size: int, shared_memory: int = LEAST_SHARED_MEMORY
) -> list[TileConfig]:
    """Tile configs for a launch with inputs of these shapes; the rule's come first. `element_size`: bytes of a weight's
    element; `shared_memory`: of a block on the GPU."""
    kernel = step.kernel
    rule = heuristic_tile_config(kernel, shapes, element_size)
    if kernel.name == "attend":
        proposals = _attend(shapes, rule)
    elif rule.tokens == 1:
        proposals = _one_token(kernel, shapes)
    else:
        proposals = _tiles(kernel, shapes, rule)
    sound = [rule]
    for tile_config in proposals:
        shared, tile = _shared(step, tile_config, shapes) * element_size, _tile(step, tile_config, shapes)
        fits = shared <= shared_memory and tile <= _REGISTERS * 32 * tile_config.num_warps
        if fits and tile_config not in sound:
            sound.append(tile_config)
    return sound


def _one_token(kernel: Kernel, shapes: Mapping[str, Shape]) -> Iterator[TileConfig]:
    """One token: what differs is how much of a weight each program asks for at once, and of how many rows."""
    if kernel.name == "retrieve":
        for outputs in (1, 2, 4, 8, 16, 32):
            yield from (TileConfig(tokens=1, outputs=outputs, num_warps=warps) for warps in (2, 4))
        return
    size = shapes["x"][2]
    for inner in sorted({min(power_of_two(size, 16), most) for most in (512, 1024, 2048, 4096)}):
        for outputs in (1, 2, 4, 8, 16, 32):
            if min(2048, 4 * inner) <= inner * outputs <= 16384:
                yield TileConfig(tokens=1, outputs=outputs, inner=inner, num_warps=8 if inner * outputs >= 8192 else 4)


def _attend(shapes: Mapping[str, Shape], rule: TileConfig) -> Iterator[TileConfig]:
    slots = shapes["keys"][2]
    if rule.tokens > 1:
        for tokens in (16, 32, 64):
            for size in (32, 64):
                yield TileConfig(tokens=tokens, slots=size, inner=32, num_warps=4, num_stages=2)
        return
    for splits in (1, 2, 4, 8, 16):
        if splits <= power_of_two(-(-slots // 32)):
            for size, warps in ((32, 4), (64, 4), (128, 8)):
                # where the query is made here, too, as much of its weight is read at a time
                yield TileConfig(tokens=1, slots=size, inner=size, splits=splits, num_warps=warps)


def _tiles(kernel: Kernel, shapes: Mapping[str, Shape], rule: TileConfig) -> Iterator[TileConfig]:
    """Several tokens, through the tensor cores."""
    widths = (16,) if kernel.name == "write_memory" else (16, 32, 64) if rule.tokens == 16 else (32, 64, 128)
    for tokens in (rule.tokens, 2 * rule.tokens):
        for outputs in widths:
            for inner, stages in ((32, 4), (64, 3), (128, 3)):
                warps = 8 if tokens * outputs > 64 * 64 else 4
                yield TileConfig(tokens=tokens, outputs=outputs, inner=inner, num_warps=warps, num_stages=stages)


def _columns(step: Step, tile_config: TileConfig, shapes: Mapping[str, Shape]) -> int:
    """Columns of what a program computes; a pair of weights counts twice."""
    match step.kernel.name:
        case "attend":
            return int(shapes["keys"][3])
        case "write_memory":
            return int(step.options["head_dim"])
        case "swiglu":
            return 2 * tile_config.outputs
    return tile_config.outputs


def _tile(step: Step, tile_config: TileConfig, shapes: Mapping[str, Shape]) -> int:
    """fp32 elements that a program sums into."""
    columns = _columns(step, tile_config, shapes)
    if tile_config.tokens > 1:
        return tile_config.tokens * columns
    if step.kernel.name == "attend":
        return columns * max(tile_config.slots, tile_config.inner)
    return columns * (shapes["acc"][4] if step.kernel.name == "retrieve" else tile_config.inner)


def _shared(step: Step, tile_config: TileConfig, shapes: Mapping[str, Shape]) -> int:
    """Elements that the stages of a loop of products hold: one operand of each side."""
    if tile_config.tokens == 1:
        return 0
    columns = _columns(step, tile_config, shapes)
    depth = max(tile_config.inner, columns) if step.kernel.name == "attend" else tile_config.inner
    return (tile_config.tokens + columns) * depth * tile_config.num_stages
