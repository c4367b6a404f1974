"""The heuristic tile config of each launch: how its work is cut where nothing was measured on the GPU."""

from collections.abc import Mapping
from dataclasses import replace

from exporters.kernels.kernel import Kernel, Shape, TileConfig, power_of_two

_PROGRAMS = 128
"""About as many as a large GPU has multiprocessors."""
_IN_FLIGHT = 16384
"""Elements of a weight that a program of the decoding form asks for at once: what hides the way to memory."""
DECODE_TOKENS = 4
"""Up to here each token is a program of its own, and their shared reads meet in the cache."""
FEW_TOKENS = 64
"""Up to here tiles are as low as the tensor cores take them."""


def heuristic_tile_config(kernel: Kernel, shapes: Mapping[str, Shape], element_size: int) -> TileConfig:
    """By the sizes alone; right everywhere, good on GPUs with about a hundred multiprocessors. Tiles fit the 99 KiB of
    shared memory that the smallest of the GPUs have. `element_size`: bytes of an element of weights and memory."""
    match kernel.name:
        case "attend":
            return _attend(shapes, element_size)
        case "write_memory":
            return TileConfig(tokens=16 if shapes["x"][1] <= FEW_TOKENS else 64, inner=32)
        case "retrieve":
            batch, length, _, _, size = shapes["acc"]
            width = shapes["weight"][0]
        case _:
            batch, length, size = shapes["x"]
            width = shapes.get("weight", shapes.get("gate_weight", ()))[0]
    tokens = batch * length
    if tokens <= DECODE_TOKENS:
        inner = min(power_of_two(size), 4096)
        outputs = power_of_two(max(4, min(_IN_FLIGHT // inner, -(-width // _PROGRAMS))))
        return TileConfig(tokens=1, outputs=outputs, inner=inner, num_warps=8 if inner * outputs >= 8192 else 4)
    if kernel.name == "retrieve":
        return _retrieve(tokens, splits=shapes["acc"][3], head_dim=size, element_size=element_size)
    if tokens > FEW_TOKENS:
        return TileConfig(tokens=64, outputs=64, inner=32)
    if kernel.name == "linear":  # few programs: each asks for more
        return TileConfig(tokens=16, outputs=16, inner=power_of_two(min(size, 256), 16), num_stages=3)
    return TileConfig(tokens=16, outputs=16, inner=128 if size >= 128 else power_of_two(size, 16))


def _retrieve(tokens: int, splits: int, head_dim: int, element_size: int) -> TileConfig:
    """For several tokens: its tiles are a whole head wide."""
    if tokens > FEW_TOKENS:
        return _within(head_dim * element_size, TileConfig(tokens=64, outputs=64, num_stages=2))
    in_flight = splits * 16 * head_dim * 4  # the loads of all splits
    return TileConfig(tokens=16, outputs=16, num_stages=max(1, min(3, 1 + (64 << 10) // in_flight)))


def _within(row: int, tile_config: TileConfig) -> TileConfig:
    """Smaller tiles where a row of them, in bytes, is longer than a head of 128 in bf16."""
    if row <= 256:
        return tile_config
    shrink = row // 256
    return replace(
        tile_config,
        tokens=max(16, tile_config.tokens // shrink),
        outputs=max(16, tile_config.outputs // shrink),
        slots=max(16, tile_config.slots // shrink),
        num_stages=1 if shrink > 2 else min(2, tile_config.num_stages),
    )


def _attend(shapes: Mapping[str, Shape], element_size: int) -> TileConfig:
    batch, length, width = shapes["x"]
    slots, head_dim = shapes["keys"][2:]
    heads = shapes.get("q_weight", (width,))[0] // head_dim
    if length > DECODE_TOKENS:
        return _within(
            head_dim * element_size, TileConfig(tokens=16 if length <= FEW_TOKENS else 64, slots=32, inner=32)
        )
    splits_to_fill = -(-_PROGRAMS // (batch * length * heads))
    splits = min(power_of_two(splits_to_fill), power_of_two(-(-slots // 64)), 16)
    if "q_weight" in shapes:  # each program makes its head's query: long reads, for few of them wait on one another
        return TileConfig(tokens=1, slots=64, inner=128, splits=splits, num_warps=8)
    return TileConfig(tokens=1, slots=64, inner=32, splits=splits)
