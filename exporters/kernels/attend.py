"""Attention to a visual memory, its slots split between programs."""

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
def attend_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    norm_ptr,
    q_weight_ptr,
    q_norm_ptr,
    cos_ptr,
    sin_ptr,
    keys_ptr,
    values_ptr,
    mask_ptr,
    S,
    M,
    acc_ptr,
    ml_ptr,
    arrived_ptr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MASK_PER_TOKEN: tl.constexpr,
    SPLITS: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    split = tl.program_id(0) % SPLITS
    s = tl.program_id(0) // SPLITS * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.program_id(1)
    b = tl.program_id(2)
    s_ok = s < S
    t = b * S + s
    d = tl.arange(0, HEAD_DIM)

    if q_weight_ptr is not None:
        total = start_product(BLOCK_T, HEAD_DIM, BLOCK_K)
        scale = tl.rsqrt(mean_square(x_ptr, t, s_ok, WIDTH, BLOCK_T, BLOCK_K) + EPS)
        for start in range(0, WIDTH, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            x = load_rows(x_ptr, t, s_ok, k, k < WIDTH, WIDTH).to(tl.float32) * scale[:, None]
            x *= tl.load(norm_ptr + k, mask=k < WIDTH, other=0.0).to(tl.float32)[None, :]
            total = add_product(
                total, x, load_rows(q_weight_ptr, head * HEAD_DIM + d, d >= 0, k, k < WIDTH, WIDTH), UPCAST
            )
        q = end_product(total, BLOCK_T)
    else:
        q = load_rows(x_ptr, t, s_ok, head * HEAD_DIM + d, d >= 0, WIDTH).to(tl.float32)
    if q_norm_ptr is not None:
        q *= tl.rsqrt(tl.sum(q * q, 1) / HEAD_DIM + EPS)[:, None]
        q *= tl.load(q_norm_ptr + d).to(tl.float32)[None, :]
    if cos_ptr is not None:
        # rotate-half: column d turns together with the one half a head away
        half: tl.constexpr = HEAD_DIM // 2
        partner = load_rows(x_ptr, t, s_ok, head * HEAD_DIM + (d + half) % HEAD_DIM, d >= 0, WIDTH).to(tl.float32)
        cos = load_rows(cos_ptr, t, s_ok, d % half, d >= 0, half).to(tl.float32)
        sin = load_rows(sin_ptr, t, s_ok, d % half, d >= 0, half).to(tl.float32)
        q = q * cos + tl.where(d < half, -partner, partner) * sin
    q *= SCALE

    acc = tl.zeros((BLOCK_T, HEAD_DIM), tl.float32)
    m = tl.full((BLOCK_T,), -1.0e30, tl.float32)
    total_weight = tl.zeros((BLOCK_T,), tl.float32)
    base = (b * KV_HEADS + head // (HEADS // KV_HEADS)).to(tl.int64) * M
    chunk = tl.cdiv(tl.cdiv(M, SPLITS), BLOCK_M) * BLOCK_M
    for start in range(split * chunk, tl.minimum(split * chunk + chunk, M), BLOCK_M):
        slot = start + tl.arange(0, BLOCK_M)
        slot_ok = slot < M
        if MASK_PER_TOKEN:
            keep = tl.load(
                mask_ptr + t.to(tl.int64)[:, None] * M + slot[None, :], mask=s_ok[:, None] & slot_ok[None, :], other=0
            )
        else:
            keep = tl.load(mask_ptr + b * M + slot, mask=slot_ok, other=0)[None, :]
        keep = keep != 0
        offsets = (base + slot)[:, None] * HEAD_DIM + d[None, :]
        keys = tl.load(keys_ptr + offsets, mask=slot_ok[:, None], other=0.0)
        values = tl.load(values_ptr + offsets, mask=slot_ok[:, None], other=0.0)
        if BLOCK_T == 1:
            scores = tl.sum(q * keys.to(tl.float32), 1)[None, :]
        elif UPCAST:
            scores = tl.dot(q, tl.trans(keys).to(tl.float32), input_precision="ieee")
        else:
            scores = tl.dot(q.to(keys.dtype), tl.trans(keys), input_precision="ieee")
        scores = tl.where(keep, scores, -1.0e30)
        m_new = tl.maximum(m, tl.max(scores, 1))
        p = tl.where(keep, tl.exp(scores - m_new[:, None]), 0.0)
        shrink = tl.exp(m - m_new)
        if BLOCK_T == 1:
            added = tl.sum(tl.trans(p) * values.to(tl.float32), 0)[None, :]
        elif UPCAST:
            added = tl.dot(p, values.to(tl.float32), input_precision="ieee")
        else:
            added = tl.dot(p.to(values.dtype), values, input_precision="ieee")
        acc = acc * shrink[:, None] + added
        total_weight = total_weight * shrink + tl.sum(p, 1)
        m = m_new

    row = (t.to(tl.int64) * HEADS + head) * SPLITS + split
    tl.store(acc_ptr + row[:, None] * HEAD_DIM + d[None, :], acc, mask=s_ok[:, None])
    tl.store(ml_ptr + row * 2, m, mask=s_ok)
    tl.store(ml_ptr + row * 2 + 1, total_weight, mask=s_ok)
    # a later kernel of the chain counts its programs here, and this one runs before it
    tl.store(arrived_ptr + t, tl.zeros((BLOCK_T,), tl.int32), mask=s_ok & (split == 0) & (head == 0))


def attend(
    x: Tensor,
    norm: Tensor | None,
    q_weight: Tensor | None,
    q_norm: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """What each token reads of the memory; the reference implementation of the kernel, with one split.

    x: queries [B, S, H * hd], or with norm [l] and q_weight [H * hd, l] what they are made from [B, S, l]. q_norm [hd];
    cos, sin [B, S, hd / 2]; keys, values [B, Hm, M, hd]; mask bool [B, M] or [B, S, M].

    -> acc fp32 [B, S, H, splits, hd], the sums of the values with the weights exp(score - m); ml fp32
    [B, S, H, splits, 2], m and the sums of the weights, which are 0 where a token sees no slot; arrived int32 [B, S],
    zeros.
    """
    batch, length, _ = x.shape
    head_dim = keys.shape[3]
    query = x.float()
    if norm is not None and q_weight is not None:
        query = F.linear(rms_norm(query, norm.float(), eps), q_weight.float())
    query = query.unflatten(-1, (-1, head_dim))
    if q_norm is not None:
        query = rms_norm(query, q_norm.float(), eps)
    query = query.transpose(1, 2)
    if cos is not None and sin is not None:
        query = rotate(query, (cos.float(), sin.float()))
    groups = query.shape[1] // keys.shape[1]
    scores = query @ keys.float().repeat_interleave(groups, 1).transpose(2, 3) * head_dim**-0.5
    seen = (mask if mask.ndim == 3 else mask[:, None])[:, None]
    scores = scores.masked_fill(~seen, -1e30)
    m = scores.amax(-1, keepdim=True) if scores.shape[-1] else scores.new_full((*scores.shape[:3], 1), -1e30)
    p = torch.where(seen, (scores - m).exp(), 0.0)
    acc = p @ values.float().repeat_interleave(groups, 1)
    ml = torch.stack((m[..., 0], p.sum(-1)), -1)
    arrived = torch.zeros((batch, length), dtype=torch.int32, device=x.device)
    return acc.transpose(1, 2)[:, :, :, None], ml.transpose(1, 2)[:, :, :, None], arrived


def _heads(shapes: Mapping[str, Shape]) -> Dim:
    weight = shapes.get("q_weight")
    return (weight[0] if weight else shapes["x"][2]) // shapes["keys"][3]


def _outputs(shapes: Mapping[str, Shape], options: Mapping[str, Any], tile_config: TileConfig) -> dict[str, Output]:
    batch, length, _ = shapes["x"]
    heads = _heads(shapes)
    return {
        "acc": Output((batch, length, heads, tile_config.splits, shapes["keys"][3]), "float32"),
        "ml": Output((batch, length, heads, tile_config.splits, 2), "float32"),
        "arrived": Output((batch, length), "int32"),
    }


def _constants(shapes: Mapping[str, Shape], options: Mapping[str, Any], tile_config: TileConfig) -> dict[str, Any]:
    head_dim = shapes["keys"][3]
    return {
        "WIDTH": shapes["x"][2],
        "HEADS": _heads(shapes),
        "KV_HEADS": shapes["keys"][1],
        "HEAD_DIM": head_dim,
        "MASK_PER_TOKEN": len(shapes["mask"]) == 3,
        "SPLITS": tile_config.splits,
        "EPS": options.get("eps", 0.0),
        "SCALE": head_dim**-0.5,
        "BLOCK_T": tile_config.tokens,
        "BLOCK_M": tile_config.slots,
        "BLOCK_K": tile_config.inner,
    }


def _grid(shapes: Mapping[str, Shape], options: Mapping[str, Any], tile_config: TileConfig) -> tuple[Dim, Dim, Dim]:
    batch, length, _ = shapes["x"]
    return cdiv(length, tile_config.tokens) * tile_config.splits, _heads(shapes), batch


KERNEL = Kernel(
    name="attend",
    function=attend_kernel,
    definition=attend,
    inputs=("x", "norm", "q_weight", "q_norm", "cos", "sin", "keys", "values", "mask"),
    sizes=lambda shapes: {"S": shapes["x"][1], "M": shapes["keys"][2]},
    outputs=_outputs,
    constants=_constants,
    grid=_grid,
)
