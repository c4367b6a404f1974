"""Every kernel in Triton's interpreter against its reference implementation in fp32: sizes that divide nothing, masks,
rows without memory, every optional input given and left out, for one token and for tiles of several."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from exporters.kernels import attend, inject, linear, retrieve, swiglu, write_memory
from exporters.kernels.kernel import Kernel, Step, TileConfig
from exporters.kernels.launch import launch
from surgeon.memory.visibility import causally

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative to the largest value: fp32 sums in another order; in the others products of several tokens round their
inputs, and results are of that dtype."""

sizes = st.integers(1, 70)
dtypes = st.sampled_from(list(TOLERANCE))
tile_configs = st.builds(
    TileConfig,
    tokens=st.sampled_from([1, 16]),
    outputs=st.sampled_from([16, 32]),
    inner=st.sampled_from([16, 64]),
    slots=st.sampled_from([16, 32]),
    splits=st.sampled_from([1, 2, 3]),
)
batches = st.tuples(st.integers(1, 3), st.integers(1, 20))


class Draw:
    """Random tensors of one dtype, the same for the same seed."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=self.generator)).to(self.dtype)

    def mask(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator) > 0.4

    def places(self, batch: int, slots: int, end: int) -> Tensor:
        """Where slots stand in a sequence, one behind the other: before `end`, the length of what is computed, and
        behind it, so that nothing sees them."""
        return torch.randint(0, end + 1, (batch, slots), generator=self.generator).sort().values

    def ml(self, batch: int, length: int, heads: int, splits: int) -> Tensor:
        """As attend gives it: every third token has seen nothing."""
        ml = torch.rand((batch, length, heads, splits, 2), generator=self.generator) + 0.1
        ml.flatten(0, 1)[::3, ..., 1] = 0
        return ml


def compare(
    kernel: Kernel, tile_config: TileConfig, dtype: torch.dtype, options: dict[str, Any], **inputs: Tensor
) -> None:
    """The kernel against its definition of the same inputs as fp32."""
    got = launch(Step("test", kernel, {}, {}, options), inputs, lambda step, types: tile_config)
    plain = {name: t.float() if t.dtype == dtype else t for name, t in inputs.items()}
    want = kernel.definition(*(plain.get(name) for name in kernel.inputs), **options)
    for (name, output), expected in zip(got.items(), want, strict=True):
        assert output.shape == expected.shape, name
        error = (output.float() - expected.float()).abs().max() / expected.abs().max().clamp(min=1)
        assert float(error) < TOLERANCE[dtype], (kernel.name, name, float(error))


@settings(max_examples=15)
@given(batches, sizes, sizes, tile_configs, dtypes, st.sets(st.sampled_from(["norm", "residual", "gate", "ml"])))
def test_linear(
    batch: tuple[int, int], size: int, width: int, tile_config: TileConfig, dtype: torch.dtype, optional: set[str]
) -> None:
    draw = Draw(dtype)
    offered = {
        "norm": draw(size),
        "residual": draw(*batch, width),
        "gate": draw(1),
        "ml": draw.ml(*batch, 3, tile_config.splits),
    }
    chosen = {name: offered[name] for name in optional}
    compare(
        linear.KERNEL,
        tile_config,
        dtype,
        {"eps": 1e-6},
        x=draw(*batch, size),
        weight=draw(width, size, scale=0.2),
        **chosen,
    )


@settings(max_examples=10)
@given(batches, sizes, sizes, tile_configs, dtypes)
def test_swiglu(batch: tuple[int, int], size: int, width: int, tile_config: TileConfig, dtype: torch.dtype) -> None:
    draw = Draw(dtype)
    weights = {name: draw(width, size, scale=0.2) for name in ("gate_weight", "up_weight")}
    compare(swiglu.KERNEL, tile_config, dtype, {"eps": 1e-6}, x=draw(*batch, size), norm=draw(size), **weights)


@settings(max_examples=20)
@given(
    batches,
    st.integers(0, 70),
    st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
    st.sampled_from([32, 64]),
    st.sampled_from(["queries", "latent", "rotated"]),
    st.sampled_from(["rows", "tokens", "causal"]),
    tile_configs,
    dtypes,
)
def test_attend_and_retrieve(
    batch: tuple[int, int],
    slots: int,
    heads: tuple[int, int],
    head_dim: int,
    form: str,
    masked: str,
    tile_config: TileConfig,
    dtype: torch.dtype,
) -> None:
    """Together: how the sums are split is theirs, and what comes out of both is not. The mask is of rows, of tokens,
    or of tokens of which each sees what stands at or before it, the first of them perhaps nothing."""
    draw = Draw(dtype)
    rows, length = batch
    count, kv_count = heads
    width = count * head_dim
    mask = draw.mask(rows, length, slots) if masked == "tokens" else draw.mask(rows, slots)
    if masked == "causal":
        mask = causally(mask, draw.places(rows, slots, end=length), torch.arange(length))
    mask[-1] = False  # a row without images
    inputs = {"keys": draw(rows, kv_count, slots, head_dim), "values": draw(rows, kv_count, slots, head_dim)}
    inputs |= {"mask": mask, "x": draw(rows, length, 40 if form == "latent" else width)}
    if form == "latent":
        inputs |= {"norm": draw(40), "q_weight": draw(width, 40, scale=0.2), "q_norm": draw(head_dim)}
    if form == "rotated":
        angles = 3 * torch.rand(rows, length, head_dim // 2)
        inputs |= {"cos": angles.cos(), "sin": angles.sin()}
    read = launch(Step("attend", attend.KERNEL, {}, {}, {"eps": 1e-6}), inputs, lambda step, types: tile_config)
    assert not read["arrived"].any()

    retrieve_inputs = {"weight": draw(24, width, scale=0.1), "residual": draw(rows, length, 24), "gate": draw(1)}
    step = Step("retrieve", retrieve.KERNEL, {}, {})
    got = launch(step, {"acc": read["acc"], "ml": read["ml"], **retrieve_inputs}, lambda step, types: tile_config)["y"]

    plain = {name: t.float() if t.dtype == dtype else t for name, t in inputs.items()}
    acc, ml, _ = attend.attend(*(plain.get(name) for name in attend.KERNEL.inputs), eps=1e-6)  # type: ignore[arg-type]
    (want,) = retrieve.retrieve(acc, ml, *(retrieve_inputs[name].float() for name in ("weight", "residual", "gate")))
    error = (got - want).abs().max() / want.abs().max().clamp(min=1)
    assert float(error) < TOLERANCE[dtype]
    sees = mask.any(-1) if mask.ndim == 3 else mask.any(-1)[:, None].expand(-1, length)
    assert torch.equal(got[~sees], retrieve_inputs["residual"][~sees].float()) and not sees[-1].any()


@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("largest", [0, 1, 2])
def test_splits_whose_scores_are_far_apart(largest: int, tokens: int) -> None:
    """Whichever split has the largest score: against another's its weight would be infinite."""
    draw = Draw(torch.float32)
    ml = draw.ml(2, 5, heads=2, splits=3)
    ml[..., largest, 0] += 200.0
    acc, weight = draw(2, 5, 2, 3, 32), draw(24, 64, scale=0.1)
    compare(retrieve.KERNEL, TileConfig(tokens=tokens, outputs=16), torch.float32, {}, acc=acc, ml=ml, weight=weight)


@settings(max_examples=15)
@given(batches, sizes, sizes, tile_configs, dtypes, st.sets(st.sampled_from(["visual_mask", "residual"])))
def test_inject(
    batch: tuple[int, int], size: int, width: int, tile_config: TileConfig, dtype: torch.dtype, optional: set[str]
) -> None:
    draw = Draw(dtype)
    offered = {"visual_mask": draw.mask(*batch), "residual": draw(*batch, width)}
    arrived = torch.zeros(batch, dtype=torch.int32)
    compare(
        inject.KERNEL,
        tile_config,
        dtype,
        {"eps": 1e-6, "rounded": True},
        x=torch.randn(*batch, size),
        weight=draw(width, size, scale=0.2),
        alpha=draw(1),
        ml=draw.ml(*batch, 2, tile_config.splits),
        arrived=arrived,
        **{name: offered[name] for name in optional},
    )
    assert not arrived.any()


@settings(max_examples=10)
@given(
    st.integers(1, 3),
    sizes,
    sizes,
    st.sampled_from([1, 3]),
    st.sampled_from([{"head_norm"}, {"norm", "cos", "sin"}, {"norm"}, set()]),
    st.sampled_from([16, 32]),
    dtypes,
)
def test_remember(
    rows: int, slots: int, size: int, heads: int, optional: set[str], tokens: int, dtype: torch.dtype
) -> None:
    draw = Draw(dtype)
    angles = 3 * torch.rand(rows, slots, 16)
    offered = {"norm": draw(size), "head_norm": draw(32), "cos": angles.cos(), "sin": angles.sin()}
    compare(
        write_memory.KERNEL,
        TileConfig(tokens=tokens, inner=32),
        dtype,
        {"eps": 1e-6, "head_dim": 32, "rounded": True},
        x=draw(rows, slots, size),
        weight=draw(heads * 32, size, scale=0.2),
        **{name: offered[name] for name in optional},
    )


@pytest.mark.parametrize("kernel", [linear, swiglu, attend, retrieve, inject, write_memory])
def test_the_parameters_are_in_the_order_that_is_promised(kernel: Any) -> None:
    """Pointers to inputs, sizes, pointers to outputs, constants: plugins and ahead-of-time builds count on it."""
    names = kernel.KERNEL.function.arg_names
    inputs = [f"{name}_ptr" for name in kernel.KERNEL.inputs]
    assert names[: len(inputs)] == inputs
    rest = names[len(inputs) :]
    kinds = ["size" if len(n) == 1 and n in "TSM" else "output" if n.endswith("_ptr") else "constant" for n in rest]
    assert kinds == sorted(kinds, key=["size", "output", "constant"].index)
    assert names[-1] == "UPCAST"
