"""The end of a PVM branch: up-projection, norm, gate, silencing, and the sum with the residual stream."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from exporters.kernels import projection
from exporters.kernels._parts import add_product, end_product, has_memory, load_rows, start_product
from exporters.kernels.kernel import Kernel, Output, Shape, TileConfig, power_of_two
from surgeon.memory.rms_norm import rms_norm


@triton.jit
def inject_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    alpha_ptr,
    ml_ptr,
    visual_mask_ptr,
    residual_ptr,
    arrived_ptr,
    T,
    y_ptr,
    raw_ptr,
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EPS: tl.constexpr,
    HEADS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UPCAST: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    t_ok, n_ok = t < T, n < N
    total = start_product(BLOCK_T, BLOCK_N, BLOCK_K)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = load_rows(x_ptr, t, t_ok, k, k < K, K).to(tl.float32)
        total = add_product(total, x, load_rows(weight_ptr, n, n_ok, k, k < K, K), UPCAST)
    raw = end_product(total, BLOCK_T)
    rows = t.to(tl.int64)[:, None] * N
    tl.store(raw_ptr + rows + n[None, :], raw, mask=t_ok[:, None] & n_ok[None, :])

    # The norm needs the whole row: whichever program of these tokens comes last finishes them.
    tl.debug_barrier()
    before = tl.atomic_add(arrived_ptr + tl.program_id(1) * BLOCK_T, 1, sem="acq_rel")
    if before == tl.num_programs(0) - 1:
        tl.debug_barrier()
        alpha = tl.load(alpha_ptr).to(tl.float32)
        c = tl.arange(0, BLOCK_C)
        first = tl.program_id(1) * BLOCK_T
        for row in range(first, tl.minimum(first + BLOCK_T, T)):
            # the whole row at once: piece by piece each would wait for memory in its turn
            at = tl.cast(row, tl.int64) * N + c
            part = tl.load(raw_ptr + at, mask=c < N, other=0.0, cache_modifier=".cg")
            y = part * (alpha * tl.rsqrt(tl.sum(part * part, 0) / N + EPS))
            gets = has_memory(ml_ptr, row, row < T, HEADS, SPLITS)
            if visual_mask_ptr is not None:
                gets = gets & (tl.load(visual_mask_ptr + row) == 0)
            y = tl.where(gets, y, 0.0)
            if residual_ptr is not None:
                y += tl.load(residual_ptr + at, mask=c < N, other=0.0).to(tl.float32)
            tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=c < N)
        # as it was before: whoever times this launch repeats it
        tl.store(arrived_ptr + tl.program_id(1) * BLOCK_T, 0)


def inject(
    x: Tensor,
    weight: Tensor,
    alpha: Tensor,
    ml: Tensor,
    visual_mask: Tensor | None,
    residual: Tensor | None,
    arrived: Tensor,
    *,
    eps: float,
    rounded: bool = False,
) -> tuple[Tensor, Tensor]:
    """residual + alpha * rms_norm(x weight^T) for the tokens that get memory; the reference implementation of the
    kernel.

    x fp32 [B, S, l], weight [d, l], alpha [1], ml as `attend` gives it, visual_mask bool [B, S], residual [B, S, d], or
    None for zero; arrived int32 [B, S], zeros, which the kernel counts in and leaves so. -> fp32 [B, S, d], or of the
    weight's dtype if `rounded`, and the rows before their norm, fp32 [B, S, d].
    """
    raw = F.linear(x, weight.float())
    gets = ml[:, :, 0, :, 1].sum(-1) != 0
    if visual_mask is not None:
        gets = gets & ~visual_mask
    y = torch.where(gets[..., None], alpha.float() * rms_norm(raw, None, eps), 0.0)
    if residual is not None:
        y = residual.float() + y
    return y.to(weight.dtype if rounded else torch.float32), raw


def _outputs(shapes: Mapping[str, Shape], options: Mapping[str, Any], tile_config: TileConfig) -> dict[str, Output]:
    batch, length, _ = shapes["x"]
    shape = (batch, length, shapes["weight"][0])
    return {"y": Output(shape, "weight" if options.get("rounded") else "float32"), "raw": Output(shape, "float32")}


def _constants(shapes: Mapping[str, Shape], options: Mapping[str, Any], tile_config: TileConfig) -> dict[str, Any]:
    return {
        **projection.constants(shapes, tile_config),
        "EPS": options["eps"],
        "HEADS": shapes["ml"][2],
        "SPLITS": shapes["ml"][3],
        "BLOCK_C": power_of_two(shapes["weight"][0]),
    }


KERNEL = Kernel(
    name="inject",
    function=inject_kernel,
    definition=inject,
    inputs=("x", "weight", "alpha", "ml", "visual_mask", "residual", "arrived"),
    sizes=projection.sizes,
    outputs=_outputs,
    constants=_constants,
    grid=projection.grid,
)
