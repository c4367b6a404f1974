"""The splits of an attention put together, and its output projection."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from exporters.kernels._parts import add_gated, add_product, end_product, load_rows, start_product
from exporters.kernels.kernel import Dim, Kernel, Output, Shape, TileConfig, cdiv


@triton.jit
def retrieve_kernel(  # type: ignore[no-untyped-def]
    acc_ptr,
    ml_ptr,
    weight_ptr,
    residual_ptr,
    gate_ptr,
    T,
    y_ptr,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    t_ok, n_ok = t < T, n < N
    d = tl.arange(0, HEAD_DIM)
    total = start_product(BLOCK_T, BLOCK_N, HEAD_DIM)
    for head in tl.range(0, HEADS, loop_unroll_factor=4 if BLOCK_T == 1 else 1):
        row = (t.to(tl.int64) * HEADS + head) * SPLITS
        m = tl.load(ml_ptr + row * 2, mask=t_ok, other=0.0)
        for split in tl.static_range(1, SPLITS):
            m = tl.maximum(m, tl.load(ml_ptr + (row + split) * 2, mask=t_ok, other=0.0))
        total_weight = tl.zeros((BLOCK_T,), tl.float32)
        x = tl.zeros((BLOCK_T, HEAD_DIM), tl.float32)
        for split in tl.static_range(0, SPLITS):
            part = (row + split) * 2
            weight = tl.exp(tl.load(ml_ptr + part, mask=t_ok, other=0.0) - m)
            total_weight += weight * tl.load(ml_ptr + part + 1, mask=t_ok, other=0.0)
            x += weight[:, None] * tl.load(
                acc_ptr + (row + split)[:, None] * HEAD_DIM + d[None, :], mask=t_ok[:, None], other=0.0
            )
        x /= tl.where(total_weight == 0.0, 1.0, total_weight)[:, None]
        w = load_rows(weight_ptr, n, n_ok, head * HEAD_DIM + d, d >= 0, HEADS * HEAD_DIM)
        total = add_product(total, x, w, UPCAST)
    y = end_product(total, BLOCK_T)
    offsets = t.to(tl.int64)[:, None] * N + n[None, :]
    ok = t_ok[:, None] & n_ok[None, :]
    y = add_gated(y, residual_ptr, gate_ptr, ml_ptr, tl.where(t_ok, t, 0), ok, offsets, HEADS, SPLITS)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=ok)


def retrieve(acc: Tensor, ml: Tensor, weight: Tensor, residual: Tensor | None, gate: Tensor | None) -> tuple[Tensor]:
    """residual + tanh(gate) * (softmax-weighted values) weight^T; the reference implementation of the kernel.

    acc, ml: what `attend` gives. weight [d, H * hd], residual [B, S, d], gate [1] -> fp32 [B, S, d]; tokens that saw no
    slot get the residual alone, or zero.
    """
    m, sums = ml[..., 0], ml[..., 1]
    weights = (m - m.amax(-1, keepdim=True)).exp()
    total = (weights * sums).sum(-1)
    x = (weights[..., None] * acc).sum(-2) / torch.where(total == 0, 1.0, total)[..., None]
    y = F.linear(x.flatten(2), weight.float())
    if gate is not None:
        y = torch.tanh(gate.float()) * y
    y = y * (sums[:, :, 0].sum(-1) != 0)[..., None]
    return (y if residual is None else residual.float() + y,)


def _outputs(shapes: Mapping[str, Shape], options: Mapping[str, Any], tile_config: TileConfig) -> dict[str, Output]:
    batch, length = shapes["acc"][:2]
    return {"y": Output((batch, length, shapes["weight"][0]), "float32")}


def _constants(shapes: Mapping[str, Shape], options: Mapping[str, Any], tile_config: TileConfig) -> dict[str, Any]:
    _, _, heads, splits, head_dim = shapes["acc"]
    return {
        "N": shapes["weight"][0],
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "SPLITS": splits,
        "BLOCK_T": tile_config.tokens,
        "BLOCK_N": tile_config.outputs,
    }


def _grid(shapes: Mapping[str, Shape], options: Mapping[str, Any], tile_config: TileConfig) -> tuple[Dim, Dim, Dim]:
    batch, length = shapes["acc"][:2]
    return cdiv(shapes["weight"][0], tile_config.outputs), cdiv(batch * length, tile_config.tokens), 1


KERNEL = Kernel(
    name="retrieve",
    function=retrieve_kernel,
    definition=retrieve,
    inputs=("acc", "ml", "weight", "residual", "gate"),
    sizes=lambda shapes: {"T": shapes["acc"][0] * shapes["acc"][1]},
    outputs=_outputs,
    constants=_constants,
    grid=_grid,
)
