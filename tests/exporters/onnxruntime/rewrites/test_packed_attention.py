import numpy as np

from exporters.onnxruntime.rewrites import PackedMultiHeadAttention
from small_graphs import op_types, parse, run

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
