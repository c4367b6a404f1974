from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from exporters.onnxruntime.rewrites import GroupedQueryAttention
from small_graphs import CACHED_ATTENTION, HKV, SMAX, B, D, H, cached_attention, op_types, parse, session


class Decoder:
    """Steps of cached attention with the caches bound as past and present at once."""

    def __init__(self, model: ir.Model) -> None:
        self.session = session(model)
        self.caches = {name: np.zeros((B, HKV, SMAX, D), np.float32) for name in ("k", "v")}

    def step(self, rows: slice, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        binding = self.session.io_binding()
        for name, value in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value[rows]))
        binding.bind_output("y")
        for name, cache in self.caches.items():
            value = ort.OrtValue.ortvalue_from_numpy(cache[rows])
            binding.bind_ortvalue_input(f"past_{name}", value)
            binding.bind_ortvalue_output(f"present_{name}", value)
        self.session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy()


def new_tokens(rng: np.random.Generator, length: int, write_indices: list[int]) -> dict[str, np.ndarray]:
    angles = rng.normal(size=(B, length, D // 2)).astype(np.float32)
    return {
        "q": rng.normal(size=(B, length, H, D)).astype(np.float32),
        "k": rng.normal(size=(B, length, HKV, D)).astype(np.float32),
        "v": rng.normal(size=(B, HKV, length, D)).astype(np.float32),
        "cos": np.cos(angles),
        "sin": np.sin(angles),
        "write_indices": np.array(write_indices, dtype=np.int64),
    }


def test_grouped_query_attention_gives_the_same_numbers() -> None:
    rewritten = cached_attention()
    rewrite = GroupedQueryAttention()
    assert rewrite(rewritten).modified and rewrite.replaced == 1
    types = op_types(rewritten)
    assert "GroupQueryAttention" in types
    # the mask and the caches' writes are gone; of four transposes the one that packs the values is left
    assert not {"Attention", "TensorScatter", "LessOrEqual"} & set(types)
    assert types.count("Transpose") == 1
    standard, fast = Decoder(cached_attention()), Decoder(rewritten)
    rng = np.random.default_rng(0)
    everything = slice(None)
    # a prompt of rows of 5, 3 and 4 tokens, padded to 5; single tokens; then 4 more a row, row by row
    steps = [
        (everything, new_tokens(rng, 5, [0, 0, 0])),
        (everything, new_tokens(rng, 1, [5, 3, 4])),
        (everything, new_tokens(rng, 1, [6, 4, 5])),
        *((slice(row, row + 1), new_tokens(rng, 4, [7, 5, 6])) for row in range(B)),
        (everything, new_tokens(rng, 1, [11, 9, 10])),
        (everything, new_tokens(rng, 1, [SMAX - 1, 10, 11])),
    ]
    for rows, feeds in steps:
        np.testing.assert_allclose(fast.step(rows, feeds), standard.step(rows, feeds), atol=1e-5)
    for name in ("k", "v"):
        np.testing.assert_allclose(fast.caches[name], standard.caches[name], atol=1e-6)


def test_several_tokens_on_filled_caches_are_for_one_row() -> None:
    """Why `BundleRuntime.append` goes row by row. When this fails, it need not any more."""
    model = cached_attention()
    GroupedQueryAttention()(model)
    decoder = Decoder(model)
    with pytest.raises(Exception, match="batch_size must be 1 when sequence_length > 1 and past context is given"):
        decoder.step(slice(None), new_tokens(np.random.default_rng(0), 2, [4, 5, 6]))


@pytest.mark.parametrize(
    "mask",
    [
        "mask = Less (slots, ends)",
        "seen = LessOrEqual (slots, ends)\n    four = Constant <value_int = 4> ()\n    first = Sub (ends, four)\n"
        "    near = Greater (slots, first)\n    mask = And (seen, near)",
        "end = Add (starts, count)\n    none = Sub (offsets, offsets)\n    last = Add (end, none)\n"
        "    mask = Less (slots, last)",
        "fixed = LessOrEqual (slots, offsets)\n    mask = And (fixed, fixed)",
    ],
    ids=["not itself", "sliding window", "bidirectional", "without the rows' starts"],
)
def test_other_masks_are_left_alone(mask: str) -> None:
    model = cached_attention(mask)
    rewrite = GroupedQueryAttention()
    assert not rewrite(model).modified and rewrite.replaced == 0
    assert "Attention" in op_types(model)


@pytest.mark.parametrize("attributes", [", softcap = 2.0", ", is_causal = 1"])
def test_attention_with_more_to_it_is_left_alone(attributes: str) -> None:
    assert not GroupedQueryAttention()(cached_attention(attributes=attributes)).modified


def test_keys_and_values_that_are_written_at_other_slots_are_left_alone() -> None:
    """The operator writes both at the same."""
    graph = CACHED_ATTENTION.replace("MASK", "mask = LessOrEqual (slots, ends)\n    first = Sub (write_indices, zero)")
    written = "TensorScatter <axis = 2> (past_v, v, {})"
    assert written.format("write_indices") in graph
    elsewhere = graph.replace("ATTRIBUTES", "").replace(written.format("write_indices"), written.format("first"))
    assert not GroupedQueryAttention()(parse(elsewhere)).modified
