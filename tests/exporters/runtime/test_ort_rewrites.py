"""The rewrites on graphs small enough to read."""

from collections.abc import Iterator, Mapping

import numpy as np
import onnx
import onnx.parser
import onnx.shape_inference
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from exporters.runtime.ort_rewrites import (
    EmulateBFloat16,
    Float32Boundary,
    GroupedQueryAttention,
    PackedMultiHeadAttention,
)

B, H, HKV, D, SMAX = 3, 4, 2, 16, 24

# Query and keys are rotated, as in a decoder; keys come transposed, values already by head.
CACHED_ATTENTION = """
<ir_version: 11, opset_import: ["" : 24]>
decoder (float[B, S, 4, 16] q, float[B, S, 2, 16] k, float[B, 2, S, 16] v, float[B, S, 8] cos, float[B, S, 8] sin,
         int64[B] write_indices, float[B, 2, 24, 16] past_k, float[B, 2, 24, 16] past_v)
    => (float[B, S, 4, 16] y, float[B, 2, 24, 16] present_k, float[B, 2, 24, 16] present_v)
{
    new = Shape <start = 1, end = 2> (q)
    count = Squeeze (new)
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    smax = Constant <value_int = 24> ()
    range = Range (zero, count, one)
    query_shape = Constant <value_ints = [1, 1, -1, 1]> ()
    row_shape = Constant <value_ints = [-1, 1, 1, 1]> ()
    slot_shape = Constant <value_ints = [1, 1, 1, -1]> ()
    offsets = Reshape (range, query_shape)
    starts = Reshape (write_indices, row_shape)
    ends = Add (starts, offsets)
    all_slots = Range (zero, smax, one)
    slots = Reshape (all_slots, slot_shape)
    MASK
    q_heads = Transpose <perm = [0, 2, 1, 3]> (q)
    k_heads = Transpose <perm = [0, 2, 1, 3]> (k)
    q_rotated = RotaryEmbedding (q_heads, cos, sin)
    k_rotated = RotaryEmbedding (k_heads, cos, sin)
    present_k = TensorScatter <axis = 2> (past_k, k_rotated, write_indices)
    present_v = TensorScatter <axis = 2> (past_v, v, write_indices)
    attended = Attention <scale = 0.3 ATTRIBUTES> (q_rotated, present_k, present_v, mask)
    y = Transpose <perm = [0, 2, 1, 3]> (attended)
}
"""


def parse(text: str) -> ir.Model:
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text), strict_mode=True, data_prop=True)
    return ir.from_proto(proto)


def cached_attention(mask: str = "mask = LessOrEqual (slots, ends)", attributes: str = "") -> ir.Model:
    return parse(CACHED_ATTENTION.replace("MASK", mask).replace("ATTRIBUTES", attributes))


def session(model: ir.Model) -> ort.InferenceSession:
    quiet = ort.SessionOptions()
    quiet.log_severity_level = 4
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), quiet, providers=["CPUExecutionProvider"])


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def run(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    return session(model).run(None, dict(feeds))


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


# -- vision ------------------------------------------------------------------------------------------------------
PACKED = """
<ir_version: 11, opset_import: ["" : 24]>
vision (float[1, N, 48] q, float[1, N, 48] k, float[1, N, 48] v, bool[1, 1, N, N] m) => (float[1, N, 48] y)
{
    y = Attention <q_num_heads = 3, kv_num_heads = KV, scale = 0.3> (q, k, v MASK)
}
"""


def test_multi_head_attention_gives_the_same_numbers() -> None:
    rng = np.random.default_rng(0)
    feeds = {name: rng.normal(size=(1, 20, 48)).astype(np.float32) for name in "qkv"}
    feeds["m"] = np.ones((1, 1, 20, 20), bool)
    text = PACKED.replace("KV", "3").replace("MASK", "")
    model = parse(text)
    rewrite = PackedMultiHeadAttention()
    assert rewrite(model).modified and rewrite.replaced == 1
    assert op_types(model) == ["MultiHeadAttention"]
    np.testing.assert_allclose(run(model, feeds)[0], run(parse(text), feeds)[0], atol=1e-6)


def test_masked_attention_is_left_alone() -> None:
    model = parse(PACKED.replace("KV", "3").replace("MASK", ", m"))
    assert not PackedMultiHeadAttention()(model).modified


# -- bf16 --------------------------------------------------------------------------------------------------------
BFLOAT16 = """
<ir_version: 11, opset_import: ["" : 24, "surgeon" : 1]>
graph (int64[N] ids, bfloat16[N, 8] x) => (bfloat16[N, 4] y, bfloat16[N, 8] rows)
<bfloat16[10, 8] table, bfloat16[4, 8] weight, bfloat16[4] scale>
{
    rows = Gather <axis = 0> (table, ids)
    h = Add (rows, x)
    z = Gemm <transB = 1> (h, weight)
    wide = Cast <to = 1> (z)
    angle = Cos (wide)
    narrow = Cast <to = 16> (angle)
    y = surgeon.Twice (narrow, scale)
}
<domain: "surgeon", opset_import: ["" : 24]>
Twice (a, b) => (c)
{
    d = Mul (a, b)
    c = Add (d, a)
}
"""


@pytest.fixture
def bfloat16() -> Iterator[tuple[ir.Model, dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"table": (10, 8), "weight": (4, 8), "scale": (4,)}
    weights = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    proto = onnx.parser.parse_model(BFLOAT16)
    for name, tensor in weights.items():
        raw = tensor.view(torch.uint16).numpy().tobytes()
        proto.graph.initializer.append(
            onnx.helper.make_tensor(name, onnx.TensorProto.BFLOAT16, tensor.shape, raw, raw=True)
        )
    yield ir.from_proto(proto), weights


def test_bfloat16_is_rounded_as_torch_rounds_it(bfloat16: tuple[ir.Model, dict[str, torch.Tensor]]) -> None:
    model, weights = bfloat16
    rewrite = EmulateBFloat16()
    assert rewrite(model).modified and rewrite.replaced > 0
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    ids = torch.tensor([1, 9, 0, 3, 3])
    y, rows = run(model, {"ids": ids.numpy(), "x": x.float().numpy()})
    expected = ((weights["table"][ids] + x) @ weights["weight"].T).float().cos().bfloat16()
    expected = expected * weights["scale"] + expected
    assert y.dtype == rows.dtype == np.float32
    np.testing.assert_array_equal(rows, weights["table"][ids].float().numpy())
    np.testing.assert_array_equal(y, expected.float().numpy())


def test_an_embedding_table_is_not_widened(bfloat16: tuple[ir.Model, dict[str, torch.Tensor]]) -> None:
    model, _ = bfloat16
    EmulateBFloat16()(model)
    table = model.graph.initializers["table"]
    assert [use.node.op_type for use in table.uses()] == ["Gather"]


def test_a_graph_without_bfloat16_is_left_alone() -> None:
    model = cached_attention()
    before = op_types(model)
    rewrite = EmulateBFloat16()
    assert not rewrite(model).modified and rewrite.replaced == 0 and op_types(model) == before


# -- boundary ----------------------------------------------------------------------------------------------------
def test_the_host_sees_float32() -> None:
    model = parse("""
        <ir_version: 11, opset_import: ["" : 24]>
        graph (float16[N] x, float16[N] past, int64[N] i) => (float16[N] y, float16[N] present, float16[N] z)
        { y = Add (x, past)
          present = Neg (y)
          z = Neg (present) }
    """)
    rewrite = Float32Boundary(keep=lambda name: name in ("past", "present"))
    assert rewrite(model).modified and rewrite.replaced == 3
    made = session(model)
    assert {v.name: v.type for v in (*made.get_inputs(), *made.get_outputs())} == {
        "x": "tensor(float)",
        "past": "tensor(float16)",
        "i": "tensor(int64)",
        "y": "tensor(float)",
        "present": "tensor(float16)",
        "z": "tensor(float)",
    }
    x = np.array([1.5, 2.0], np.float32)
    y, present, z = made.run(None, {"x": x, "past": x.astype(np.float16), "i": np.zeros(2, np.int64)})
    assert y.tolist() == z.tolist() == [3.0, 4.0] and present.tolist() == [-3.0, -4.0]
