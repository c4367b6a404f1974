"""How launches that project tokens are cut: `x` [B, S, K] by a weight [N, K], tiles of tokens by tiles of outputs."""

from collections.abc import Mapping
from typing import Any

from exporters.kernels.kernel import Dim, Shape, TileConfig, cdiv


def sizes(shapes: Mapping[str, Shape]) -> dict[str, Dim]:
    return {"T": shapes["x"][0] * shapes["x"][1]}


def constants(shapes: Mapping[str, Shape], tile_config: TileConfig) -> dict[str, Any]:
    width, size = weight(shapes)
    return {
        "K": size,
        "N": width,
        "BLOCK_T": tile_config.tokens,
        "BLOCK_N": tile_config.outputs,
        "BLOCK_K": tile_config.inner,
    }


def grid(shapes: Mapping[str, Shape], options: Mapping[str, Any], tile_config: TileConfig) -> tuple[Dim, Dim, Dim]:
    batch, length, _ = shapes["x"]
    return cdiv(weight(shapes)[0], tile_config.outputs), cdiv(batch * length, tile_config.tokens), 1


def weight(shapes: Mapping[str, Shape]) -> Shape:
    """Of the one that projects, or of the first of two that do alike."""
    return shapes["weight"] if "weight" in shapes else shapes["gate_weight"]
