"""A projection of tokens with what stands before and after it: a norm, and a gated residual."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from exporters.kernels import projection
from exporters.kernels._parts import (
    add_gated,
    add_product,
    end_product,
    load_rows,
    mean_square,
    start_product,
)
from exporters.kernels.kernel import Kernel, Output, Shape, TileConfig
from surgeon.memory.rms_norm import rms_norm


@triton.jit
def linear_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    norm_ptr,
    weight_ptr,
    residual_ptr,
    gate_ptr,
    ml_ptr,
    T,
    y_ptr,
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EPS: tl.constexpr,
    HEADS: tl.constexpr,
    SPLITS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    t_ok, n_ok = t < T, n < N
    total = start_product(BLOCK_T, BLOCK_N, BLOCK_K)
    squares = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    if norm_ptr is not None and BLOCK_T > 1:
        scale = tl.rsqrt(mean_square(x_ptr, t, t_ok, K, BLOCK_T, BLOCK_K) + EPS)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = load_rows(x_ptr, t, t_ok, k, k < K, K).to(tl.float32)
        if norm_ptr is not None:
            if BLOCK_T > 1:
                x *= scale[:, None]  # before it is rounded to the weight's dtype
            else:
                squares += x * x
            x *= tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
        total = add_product(total, x, load_rows(weight_ptr, n, n_ok, k, k < K, K), UPCAST)
    y = end_product(total, BLOCK_T)
    if norm_ptr is not None and BLOCK_T == 1:
        y *= tl.rsqrt(tl.sum(squares, 1) / K + EPS)[:, None]
    offsets = t.to(tl.int64)[:, None] * N + n[None, :]
    ok = t_ok[:, None] & n_ok[None, :]
    y = add_gated(y, residual_ptr, gate_ptr, ml_ptr, tl.where(t_ok, t, 0), ok, offsets, HEADS, SPLITS)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=ok)


def linear(
    x: Tensor,
    norm: Tensor | None,
    weight: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    ml: Tensor | None,
    *,
    eps: float = 0.0,
    rounded: bool = False,
) -> tuple[Tensor]:
    """residual + tanh(gate) * rms_norm(x, norm) weight^T; the reference implementation of the kernel.

    x [B, S, K], weight [N, K], norm [K], residual [B, S, N], gate [1] -> fp32 [B, S, N], or of the weight's dtype if
    `rounded`. ml fp32 [B, S, H, splits, 2], as `attend` gives it: tokens that saw no slot get the residual alone. What
    is None is left out.
    """
    x = x.float() if norm is None else rms_norm(x.float(), norm.float(), eps)
    y = F.linear(x, weight.float())
    if gate is not None:
        y = torch.tanh(gate.float()) * y
    if ml is not None:
        y = y * (ml[:, :, 0, :, 1].sum(-1) != 0)[..., None]
    if residual is not None:
        y = residual.float() + y
    return (y.to(weight.dtype if rounded else torch.float32),)


def _outputs(shapes: Mapping[str, Shape], options: Mapping[str, Any], tile_config: TileConfig) -> dict[str, Output]:
    batch, length, _ = shapes["x"]
    return {"y": Output((batch, length, shapes["weight"][0]), "weight" if options.get("rounded") else "float32")}


def _constants(shapes: Mapping[str, Shape], options: Mapping[str, Any], tile_config: TileConfig) -> dict[str, Any]:
    ml = shapes.get("ml")
    return {
        **projection.constants(shapes, tile_config),
        "EPS": options.get("eps", 0.0),
        "HEADS": ml[2] if ml else 1,
        "SPLITS": ml[3] if ml else 1,
    }


KERNEL = Kernel(
    name="linear",
    function=linear_kernel,
    definition=linear,
    inputs=("x", "norm", "weight", "residual", "gate", "ml"),
    sizes=projection.sizes,
    outputs=_outputs,
    constants=_constants,
    grid=projection.grid,
)
