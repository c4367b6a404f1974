"""Visual embeddings made keys or values of a memory, in the layout in which it is read."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from exporters.kernels._parts import add_product, end_product, load_rows, mean_square, start_product
from exporters.kernels.kernel import Dim, Kernel, Output, Shape, TileConfig, cdiv
from surgeon.memory.rms_norm import rms_norm
from surgeon.memory.rotary import rotate


@triton.jit
def write_memory_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    norm_ptr,
    weight_ptr,
    head_norm_ptr,
    cos_ptr,
    sin_ptr,
    M,
    y_ptr,
    K: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    slot = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.program_id(1)
    b = tl.program_id(2)
    ok = slot < M
    row = b * M + slot
    d = tl.arange(0, HALF)
    # the two halves of a head, which turn together
    first = start_product(BLOCK_T, HALF, BLOCK_K)
    second = start_product(BLOCK_T, HALF, BLOCK_K)
    if norm_ptr is not None:
        scale = tl.rsqrt(mean_square(x_ptr, row, ok, K, BLOCK_T, BLOCK_K) + EPS)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = load_rows(x_ptr, row, ok, k, k < K, K).to(tl.float32)
        if norm_ptr is not None:
            x *= scale[:, None]
            x *= tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
        out = head * 2 * HALF + d
        first = add_product(first, x, load_rows(weight_ptr, out, d >= 0, k, k < K, K), UPCAST)
        second = add_product(second, x, load_rows(weight_ptr, out + HALF, d >= 0, k, k < K, K), UPCAST)
    low, high = end_product(first, BLOCK_T), end_product(second, BLOCK_T)
    if head_norm_ptr is not None:
        scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF) + EPS)[:, None]
        low *= scale * tl.load(head_norm_ptr + d).to(tl.float32)[None, :]
        high *= scale * tl.load(head_norm_ptr + HALF + d).to(tl.float32)[None, :]
    if cos_ptr is not None:
        cos = load_rows(cos_ptr, row, ok, d, d >= 0, HALF).to(tl.float32)
        sin = load_rows(sin_ptr, row, ok, d, d >= 0, HALF).to(tl.float32)
        low, high = low * cos - high * sin, high * cos + low * sin
    place = y_ptr + ((b * HEADS + head).to(tl.int64) * M + slot)[:, None] * (2 * HALF) + d[None, :]
    tl.store(place, low.to(y_ptr.dtype.element_ty), mask=ok[:, None])
    tl.store(place + HALF, high.to(y_ptr.dtype.element_ty), mask=ok[:, None])


def write_memory(
    x: Tensor,
    norm: Tensor | None,
    weight: Tensor,
    head_norm: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    head_dim: int,
    eps: float = 0.0,
    rounded: bool = False,
) -> tuple[Tensor]:
    """rotate(rms_norm(rms_norm(x, norm) weight^T, head_norm)); the reference implementation of the kernel.

    x [B, M, K], norm [K], weight [Hm * hd, K], head_norm [hd], cos, sin [B, M, hd / 2] -> fp32 [B, Hm, M, hd], or
    of the weight's dtype if `rounded`. What is None is left out.
    """
    x = x.float() if norm is None else rms_norm(x.float(), norm.float(), eps)
    y = F.linear(x, weight.float()).unflatten(-1, (-1, head_dim))
    if head_norm is not None:
        y = rms_norm(y, head_norm.float(), eps)
    y = y.transpose(1, 2)
    if cos is not None and sin is not None:
        y = rotate(y, (cos.float(), sin.float()))
    return (y.to(weight.dtype if rounded else torch.float32).contiguous(),)


def _outputs(shapes: Mapping[str, Shape], options: Mapping[str, Any], tile_config: TileConfig) -> dict[str, Output]:
    batch, slots, _ = shapes["x"]
    head_dim = options["head_dim"]
    return {
        "y": Output(
            (batch, shapes["weight"][0] // head_dim, slots, head_dim), "weight" if options.get("rounded") else "float32"
        )
    }


def _constants(shapes: Mapping[str, Shape], options: Mapping[str, Any], tile_config: TileConfig) -> dict[str, Any]:
    width, size = shapes["weight"]
    return {
        "K": size,
        "HEADS": width // options["head_dim"],
        "HALF": options["head_dim"] // 2,
        "EPS": options.get("eps", 0.0),
        "BLOCK_T": tile_config.tokens,
        "BLOCK_K": tile_config.inner,
    }


def _grid(shapes: Mapping[str, Shape], options: Mapping[str, Any], tile_config: TileConfig) -> tuple[Dim, Dim, Dim]:
    batch, slots, _ = shapes["x"]
    return cdiv(slots, tile_config.tokens), shapes["weight"][0] // options["head_dim"], batch


KERNEL = Kernel(
    name="write_memory",
    function=write_memory_kernel,
    definition=write_memory,
    inputs=("x", "norm", "weight", "head_norm", "cos", "sin"),
    sizes=lambda shapes: {"M": shapes["x"][1]},
    outputs=_outputs,
    constants=_constants,
    grid=_grid,
)
