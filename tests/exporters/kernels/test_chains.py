"""Each graft in fused launches, interpreted, against its reference implementation and against what its authors
computed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from exporters.kernels import launch, mixin, pvm
from golden import DATA, our_name, published_mixin
from surgeon.memory.graft import Graft
from surgeon.memory.mixin import Mixin
from surgeon.memory.pvm import PersistentVisualMemory
from surgeon.memory.rotary import Rope
from surgeon.memory.visibility import causally

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative, against fp32."""


def randomised(graft: Graft, dtype: torch.dtype) -> Graft:
    """Every parameter away from its value at insertion, the gates open."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in graft.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.5 if parameter.ndim == 1 else 0.2))
            if name in graft.gates:
                parameter.fill_(0.8)
    return graft.to(dtype).requires_grad_(False)


def inputs_of(chain: object, *tensors: Tensor | None) -> dict[str, Tensor | None]:
    return launch.contiguous(dict(zip(chain.inputs, tensors, strict=True)))  # type: ignore[attr-defined]


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == want.shape and got.dtype == dtype
    assert float((got.float() - want.float()).abs().max() / want.abs().max()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "length"), [(3, 1), (3, 21), (1, 70)])
def test_pvm(dtype: torch.dtype, rows: int, length: int) -> None:
    """Grouped queries; images of another number in each row, and none in the last of several."""
    graft = randomised(PersistentVisualMemory(96, 64, 40, head_dim=32, num_key_value_heads=1, eps=1e-6), dtype)
    assert isinstance(graft, PersistentVisualMemory)
    slots = 45
    mask = torch.arange(slots) < torch.tensor([45, 7, 0][:rows])[:, None]
    visual = torch.rand(rows, length) > 0.7
    embeds, hidden_states, residual = (torch.randn(rows, n, 96).to(dtype) for n in (slots, length, length))
    chain = pvm.memory_chain(graft.eps, 32)
    keys, values = launch.run(chain, inputs_of(chain, embeds, *graft.memory_weights()))
    plain = graft.float()
    want_keys, want_values = plain.project(embeds.float())
    close(keys, want_keys, dtype)
    close(values, want_values, dtype)

    want = plain.attend(hidden_states.float(), keys.float(), values.float(), mask, visual)
    graft = graft.to(dtype)
    chain = pvm.chain(graft.eps)
    (got,) = launch.run(chain, inputs_of(chain, hidden_states, keys, values, mask, visual, *graft.weights(), None))
    close(got, want, dtype)
    assert not got[visual].any() and (rows == 1 or not got[2].any())
    (added,) = launch.run(chain, inputs_of(chain, hidden_states, keys, values, mask, None, *graft.weights(), residual))
    want = residual.float() + graft.float().attend(hidden_states.float(), keys.float(), values.float(), mask, None)
    close(added, want, dtype)
    assert rows == 1 or torch.equal(added[2], residual[2])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "length"), [(3, 1), (3, 21)])
def test_mixin(dtype: torch.dtype, rows: int, length: int) -> None:
    rope = Rope(32, 1e4)
    graft = randomised(Mixin(96, num_heads=3, intermediate_size=72, rope=rope, eps=1e-5), dtype)
    assert isinstance(graft, Mixin)
    slots = 45
    mask = (torch.rand(rows, length, slots) > 0.3) & (torch.tensor([1, 1, 0])[:, None, None] == 1)
    embeds, hidden_states = (torch.randn(rows, n, 96).to(dtype) for n in (slots, length))
    media, text = (rope(torch.randint(0, 900, (1, rows, n))) for n in (slots, length))
    chain = mixin.memory_chain(graft.eps, 32)
    keys, values = launch.run(chain, inputs_of(chain, embeds, *media, *graft.memory_weights()))
    plain = graft.float()
    want_keys, want_values = plain.project(embeds.float(), media)
    close(keys, want_keys, dtype)
    close(values, want_values, dtype)

    want = plain.attend(hidden_states.float(), keys.float(), values.float(), mask, None, text)
    graft = graft.to(dtype)
    chain = mixin.chain(graft.eps)
    (got,) = launch.run(chain, inputs_of(chain, hidden_states, keys, values, mask, *text, *graft.weights()))
    close(got, want, dtype)
    assert torch.equal(got[2], hidden_states[2])


@settings(max_examples=8)
@given(
    st.sampled_from(["pvm", "mixin"]),
    st.sampled_from(list(TOLERANCE)),
    st.lists(st.integers(0, 30), min_size=1, max_size=3),
    st.sampled_from([1, 2, 5, 21, 70]),
    st.integers(1, 45),
)
def test_tokens_see_what_stands_before_them(
    kind: str, dtype: torch.dtype, begins: list[int], length: int, slots: int
) -> None:
    """Prefill, a later turn and decoding: row b's first token has the place begins[b]. Some tokens see nothing, others
    of their row do; what comes after a token changes nothing of it."""
    rows, rope = len(begins), Rope(32, 1e4)
    graft: Graft
    if kind == "pvm":
        graft = randomised(PersistentVisualMemory(96, 64, 40, head_dim=32, num_key_value_heads=1, eps=1e-6), dtype)
    else:
        graft = randomised(Mixin(96, num_heads=3, intermediate_size=72, rope=rope, eps=1e-5), dtype)
    places = (torch.arange(slots) // 3 * 7).expand(rows, -1)  # images with text between them
    mask = causally(torch.rand(rows, slots) < 0.9, places, torch.tensor(begins)[:, None] + torch.arange(length))
    hidden_states = torch.randn(rows, length, 96).to(dtype)
    keys, values = (torch.randn(rows, 1 if kind == "pvm" else 3, slots, 32).to(dtype) for _ in range(2))
    angles = rope(torch.arange(length).expand(1, rows, -1)) if kind == "mixin" else None
    chain = (pvm if kind == "pvm" else mixin).chain(graft.eps)

    def run(mask: Tensor) -> Tensor:
        middle = (None,) if angles is None else angles
        tail = (None,) if kind == "pvm" else ()
        weights = graft.weights()  # type: ignore[operator]
        (output,) = launch.run(chain, inputs_of(chain, hidden_states, keys, values, mask, *middle, *weights, *tail))
        return output

    got = run(mask)
    sees = mask.any(-1)
    nothing = torch.zeros_like(got) if kind == "pvm" else hidden_states
    assert torch.equal(got[~sees], nothing[~sees])
    if sees.any():
        want = graft.float().attend(hidden_states.float(), keys.float(), values.float(), mask, None, angles)
        graft.to(dtype)
        close(got, want, dtype)
    if length > 1:
        last = places[0] > max(begins) + length - 2  # what the last token alone may see
        keys[:, :, last], values[:, :, last] = 10.0, 1e4
        torch.testing.assert_close(run(mask)[:, :-1], got[:, :-1], atol=0, rtol=0)


def test_pvm_equals_its_authors() -> None:
    tensors = load_file(DATA / "pvm_block_a.safetensors")
    block = PersistentVisualMemory(64, 32, 96, head_dim=16, num_key_value_heads=1, eps=1e-6)
    block.load_state_dict({our_name(k.removeprefix("weight.")): t for k, t in tensors.items() if k[:7] == "weight."})
    block.requires_grad_(False)
    mask = torch.arange(7) < tensors["input.visual_lengths"][:, None]
    keys, values = block.project(tensors["input.visual_embeds"])
    chain = pvm.chain(block.eps)
    inputs = (tensors["input.hidden_states"], keys, values, mask, tensors["input.query_is_visual"])
    (got,) = launch.run(chain, inputs_of(chain, *inputs, *block.weights(), None))
    torch.testing.assert_close(got, tensors["output.injection"], atol=1e-5, rtol=0)


def test_mixin_equals_its_authors() -> None:
    block, tensors = published_mixin()
    block.requires_grad_(False)
    keys, values = block.project(tensors["input.visual_embeds"], block.rope(tensors["input.media_position_ids"][None]))
    mask = torch.ones(1, 12, dtype=torch.bool)
    text = block.rope(tensors["input.text_position_ids"][None])
    chain = mixin.chain(block.eps)
    (got,) = launch.run(
        chain, inputs_of(chain, tensors["input.hidden_states"], keys, values, mask, *text, *block.weights())
    )
    torch.testing.assert_close(got, tensors["output.hidden_states"], atol=1e-5, rtol=0)


def test_what_is_not_finite_is_not_taken_for_an_empty_memory() -> None:
    graft = randomised(PersistentVisualMemory(96, 64, 40, head_dim=32, num_key_value_heads=1, eps=1e-6), torch.float32)
    assert isinstance(graft, PersistentVisualMemory)
    hidden_states, residual = torch.randn(2, 1, 96), torch.randn(2, 1, 96)
    hidden_states[0, 0, 5] = float("nan")
    keys, values = graft.project(torch.randn(2, 7, 96))
    chain = pvm.chain(graft.eps)
    inputs = (hidden_states, keys, values, torch.ones(2, 7, dtype=torch.bool), None)
    (got,) = launch.run(chain, inputs_of(chain, *inputs, *graft.weights(), residual))
    assert bool(got[0].isnan().all()) and bool(got[1].isfinite().all())
