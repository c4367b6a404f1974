"""The operators that exported graphs are written in: numbers against plain loops, and what tracing relies on."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.library import opcheck

from surgeon import ops

B, S, H, KV, D, SMAX = 2, 5, 4, 2, 8, 9


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def arguments(dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    def t(*shape: int) -> Tensor:
        return drawn(*shape, dtype=dtype)

    mask = torch.tril(torch.ones(S, SMAX, dtype=torch.bool))[None, None].repeat(B, 1, 1, 1)
    packed = torch.tril(torch.ones(S, S, dtype=torch.bool))[None, None].repeat(B, 1, 1, 1)
    return {
        "rms_norm": (t(B, S, D), t(D), 1e-3),
        "rope": (t(B, H, S, D), t(B, S, D // 2), t(B, S, D // 2)),
        "rope_packed": (t(B, S, H * D), t(B, S, D // 2), t(B, S, D // 2), H),
        "attention": (t(B, H, S, D), t(B, KV, SMAX, D), t(B, KV, SMAX, D), mask, 0.3),
        "attention_packed": (t(B, S, H * D), t(B, S, H * D), t(B, S, H * D), packed, H, 0.3),
        "cache_update": (t(B, H, SMAX, D), t(B, H, S, D), torch.tensor([0, 4])),
        "split3": (t(B, S, 3 * D),),
    }


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One head, one token: x [hd]; cos, sin [hd / 2]; each pair (i, i + hd / 2) turned by its angle."""
    half = len(x) // 2
    pairs = [(x[i] * cos[i] - x[i + half] * sin[i], x[i + half] * cos[i] + x[i] * sin[i]) for i in range(half)]
    return torch.stack([a for a, _ in pairs] + [b for _, b in pairs])


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rows = [[[rotated(x[b, h, s], cos[b, s], sin[b, s]) for s in range(S)] for h in range(H)] for b in range(B)]
    return torch.stack([torch.stack([torch.stack(head) for head in row]) for row in rows])


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (H, D)).transpose(1, 2)


def packed(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def cache_update(cache: Tensor, new: Tensor, write_indices: Tensor) -> Tensor:
    cache = cache.clone()
    for row, start in enumerate(write_indices.tolist()):
        cache[row, :, start : start + S] = new[row]
    return cache


PLAIN: dict[str, Callable[..., Any]] = {
    "rms_norm": lambda x, weight, eps: F.rms_norm(x, (D,), weight, eps),
    "rope": rope,
    "rope_packed": lambda x, cos, sin, num_heads: packed(rope(heads(x), cos, sin)),
    "attention": attention,
    "attention_packed": lambda q, k, v, mask, n, scale: packed(attention(heads(q), heads(k), heads(v), mask, scale)),
    "cache_update": cache_update,
    "split3": lambda x: (x[..., :D], x[..., D : 2 * D], x[..., 2 * D :]),
}


@pytest.mark.parametrize("name", PLAIN)
def test_numbers_are_those_of_a_plain_implementation(name: str) -> None:
    inputs = arguments(torch.float32)[name]
    torch.testing.assert_close(getattr(ops, name)(*inputs), PLAIN[name](*inputs), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", PLAIN)
def test_shapes_and_dtypes_are_known_without_computing(name: str, dtype: torch.dtype) -> None:
    checks = ("test_schema", "test_faketensor")
    opcheck(getattr(ops, name), arguments(dtype)[name], test_utils=checks)


def test_every_operator_is_tested() -> None:
    registered = {name for name, each in vars(ops).items() if isinstance(each, CustomOpDef)}
    assert registered == PLAIN.keys()
