"""Operators that an exported graph is written in: each computes in torch, has a shape function, is one ONNX operator.

Modules written for export (a family's vision tower, the decoder) call these where torch's own operators would fall
apart into primitives that no backend fuses. The lowering of each to ONNX is in `exporters/onnx/lowering.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("surgeon::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, statistics in fp32, as transformers computes it. x [..., d], weight [d]."""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("surgeon::rope", mutates_args=())
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, rotate-half form, per head. x [B, H, S, hd]; cos, sin [B, S, hd / 2] of x's dtype."""
    cos, sin = cos[:, None], sin[:, None]
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


@rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("surgeon::rope_packed", mutates_args=())
def rope_packed(x: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    """`rope` over heads packed in the last dimension: no Transpose. x [B, S, H * hd]; cos, sin [B, S, hd / 2]."""
    y = x.unflatten(-1, (num_heads, -1))
    cos, sin = cos[:, :, None], sin[:, :, None]
    a, b = y.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).flatten(2)


@rope_packed.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("surgeon::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Grouped-query attention. q [B, H, S, hd]; k, v [B, Hkv, T, hd]; mask bool [B, 1, S, T], True where seen."""
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]).clone()


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


@torch.library.custom_op("surgeon::attention_packed", mutates_args=())
def attention_packed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, num_heads: int, scale: float) -> Tensor:
    """`attention` over heads packed in the last dimension. q, k, v [B, S, H * hd]; mask bool [B, 1, S, S]."""
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2).flatten(2).clone()


@attention_packed.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, num_heads: int, scale: float) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


@torch.library.custom_op("surgeon::cache_update", mutates_args=())
def cache_update(cache: Tensor, new: Tensor, write_indices: Tensor) -> Tensor:
    """The cache with `new` written from each row's index on.

    cache [B, H, Smax, hd]; new [B, H, S, hd]; write_indices int64 [B].
    """
    slots = write_indices[:, None] + torch.arange(new.shape[2], device=new.device)
    index = slots[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
    return cache.scatter(2, index, new)


@cache_update.register_fake
def _(cache: Tensor, new: Tensor, write_indices: Tensor) -> Tensor:
    return torch.empty_like(cache)


@torch.library.custom_op("surgeon::split3", mutates_args=())
def split3(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The last dimension in three equal parts (a fused qkv projection's output)."""
    a, b, c = x.chunk(3, -1)
    return a.clone(), b.clone(), c.clone()


@split3.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*x.shape[:-1], x.shape[-1] // 3)
    a, b, c = (torch.empty(shape, dtype=x.dtype, device=x.device) for _ in range(3))
    return a, b, c
