"""How launches that project tokens are cut: `x` [B, S, K] by a weight [N, K], tiles of tokens by tiles of outputs."""

from collections.abc import Mapping
from typing import Any

from exporters.kernels.kernel import Blocks, Dim, Shape, cdiv


def sizes(shapes: Mapping[str, Shape]) -> dict[str, Dim]:
    return {"T": shapes["x"][0] * shapes["x"][1]}


def constants(shapes: Mapping[str, Shape], blocks: Blocks) -> dict[str, Any]:
    width, size = weight(shapes)
    return {
        "K": size,
        "N": width,
        "BLOCK_T": blocks.tokens,
        "BLOCK_N": blocks.outputs,
        "BLOCK_K": blocks.inner,
    }


def grid(shapes: Mapping[str, Shape], options: Mapping[str, Any], blocks: Blocks) -> tuple[Dim, Dim, Dim]:
    batch, length, _ = shapes["x"]
    return cdiv(weight(shapes)[0], blocks.outputs), cdiv(batch * length, blocks.tokens), 1


def weight(shapes: Mapping[str, Shape]) -> Shape:
    """Of the one that projects, or of the first of two that do alike."""
    return shapes["weight"] if "weight" in shapes else shapes["gate_weight"]
