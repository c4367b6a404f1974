"""The first half of a SwiGLU feed-forward, its norm in front."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from exporters.kernels import projection
from exporters.kernels._parts import add_product, end_product, load_rows, mean_square, start_product
from exporters.kernels.kernel import Kernel, Output, Shape, TileConfig
from surgeon.memory.rms_norm import rms_norm


@triton.jit
def swiglu_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    norm_ptr,
    gate_weight_ptr,
    up_weight_ptr,
    T,
    y_ptr,
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EPS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    t_ok, n_ok = t < T, n < N
    gate = start_product(BLOCK_T, BLOCK_N, BLOCK_K)
    up = start_product(BLOCK_T, BLOCK_N, BLOCK_K)
    squares = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    if BLOCK_T > 1:
        scale = tl.rsqrt(mean_square(x_ptr, t, t_ok, K, BLOCK_T, BLOCK_K) + EPS)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = load_rows(x_ptr, t, t_ok, k, k < K, K).to(tl.float32)
        if BLOCK_T > 1:
            x *= scale[:, None]  # before it is rounded to the weight's dtype
        else:
            squares += x * x
        x *= tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
        gate = add_product(gate, x, load_rows(gate_weight_ptr, n, n_ok, k, k < K, K), UPCAST)
        up = add_product(up, x, load_rows(up_weight_ptr, n, n_ok, k, k < K, K), UPCAST)
    a, b = end_product(gate, BLOCK_T), end_product(up, BLOCK_T)
    if BLOCK_T == 1:
        last = tl.rsqrt(tl.sum(squares, 1) / K + EPS)[:, None]
        a *= last
        b *= last
    y = a * tl.sigmoid(a) * b
    offsets = t.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=t_ok[:, None] & n_ok[None, :])


def swiglu(x: Tensor, norm: Tensor, gate_weight: Tensor, up_weight: Tensor, *, eps: float) -> tuple[Tensor]:
    """silu(u gate_weight^T) * (u up_weight^T) of u = rms_norm(x, norm); the reference implementation of the kernel.

    x [B, S, K], norm [K], weights [N, K] -> fp32 [B, S, N].
    """
    normed = rms_norm(x.float(), norm.float(), eps)
    return (F.silu(F.linear(normed, gate_weight.float())) * F.linear(normed, up_weight.float()),)


def _outputs(shapes: Mapping[str, Shape], options: Mapping[str, Any], tile_config: TileConfig) -> dict[str, Output]:
    batch, length, _ = shapes["x"]
    return {"y": Output((batch, length, shapes["gate_weight"][0]), "float32")}


def _constants(shapes: Mapping[str, Shape], options: Mapping[str, Any], tile_config: TileConfig) -> dict[str, Any]:
    return {
        **projection.constants(shapes, tile_config),
        "EPS": options["eps"],
    }


KERNEL = Kernel(
    name="swiglu",
    function=swiglu_kernel,
    definition=swiglu,
    inputs=("x", "norm", "gate_weight", "up_weight"),
    sizes=projection.sizes,
    outputs=_outputs,
    constants=_constants,
    grid=projection.grid,
)
