"""What several kernels share inside: products of a tile, masks of columns, and the end of a gated branch.

A tile of one token (decoding) is multiplied element by element and summed, which keeps every byte of a weight in
flight; a tile of several goes through the tensor cores. Sums are in fp32 either way.
"""

import triton
import triton.language as tl


@triton.jit
def start_product(BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """What `add_product` adds to: [BLOCK_N, BLOCK_K] for one token, summed at the end, else [BLOCK_T, BLOCK_N]."""
    if BLOCK_T == 1:
        return tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    else:
        return tl.zeros((BLOCK_T, BLOCK_N), tl.float32)


@triton.jit
def add_product(total, x, weight, UPCAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """total + x weight^T; x fp32 [BLOCK_T, BLOCK_K], weight [BLOCK_N, BLOCK_K]. UPCAST: for Triton's interpreter, whose
    product of bf16 tiles is wrong."""
    if x.shape[0] == 1:
        return total + x * weight.to(tl.float32)
    elif UPCAST:
        return tl.dot(x, tl.trans(weight).to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(x.to(weight.dtype), tl.trans(weight), total, input_precision="ieee")


@triton.jit
def end_product(total, BLOCK_T: tl.constexpr):  # type: ignore[no-untyped-def]
    """-> [BLOCK_T, BLOCK_N]."""
    if BLOCK_T == 1:
        return tl.sum(total, 1)[None, :]
    else:
        return total


@triton.jit
def load_rows(pointer, rows, row_ok, columns, column_ok, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of a matrix [*, WIDTH]; zeros outside."""
    offsets = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    return tl.load(pointer + offsets, mask=row_ok[:, None] & column_ok[None, :], other=0.0)


@triton.jit
def mean_square(pointer, rows, row_ok, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of each row of a matrix [*, WIDTH] -> fp32 [BLOCK_T]."""
    total = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = load_rows(pointer, rows, row_ok, k, k < WIDTH, WIDTH).to(tl.float32)
        total += x * x
    return tl.sum(total, 1) / WIDTH


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    """Of fp32, without overflow on either side."""
    e = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    # near zero the quotient cancels, and a gate starts there
    return tl.where(tl.abs(x) < 0.02, x * (1.0 - x * x / 3.0), tl.where(x < 0, -y, y))


@triton.jit
def has_memory(ml_ptr, rows, row_ok, HEADS: tl.constexpr, SPLITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether a token saw any slot: the sum of its first head's weights over all splits is not zero -> [BLOCK_T]."""
    base = tl.cast(rows, tl.int64) * (HEADS * SPLITS * 2)
    seen = tl.load(ml_ptr + base + 1, mask=row_ok, other=0.0)
    for split in tl.static_range(1, SPLITS):
        seen += tl.load(ml_ptr + base + 2 * split + 1, mask=row_ok, other=0.0)
    return seen != 0.0  # NaN is something that was seen


@triton.jit
def add_gated(y, residual_ptr, gate_ptr, ml_ptr, rows, ok, offsets, HEADS: tl.constexpr, SPLITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The end of a branch: residual + tanh(gate) y, where there is a gate and the token saw a memory; each of residual,
    gate and ml may be None. y fp32 [BLOCK_T, BLOCK_N]; rows [BLOCK_T]; ok and offsets of y's shape."""
    if gate_ptr is not None:
        y *= tanh(tl.load(gate_ptr).to(tl.float32))
    if ml_ptr is not None:
        seen = has_memory(ml_ptr, rows, rows >= 0, HEADS, SPLITS)
        y = tl.where(seen[:, None], y, 0.0)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
    return y
