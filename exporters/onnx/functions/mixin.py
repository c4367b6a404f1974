"""CoMemo's mixin layer: `surgeon.memory.mixin` as a function of the domain."""

from typing import Any

import torch
from onnxscript import BOOL, INT32, script
from torch import Tensor

from exporters.onnx.functions._base import GraftFunction, domain, op
from exporters.operators.mixin import mixin
from surgeon import ops
from surgeon.memory import mixin as memory
from surgeon.memory.rotary import Rotary


@script(domain, default_opset=op)  # type: ignore[untyped-decorator]
def Mixin(  # type: ignore[no-untyped-def]
    hidden_states,
    keys,
    values,
    memory_mask,
    cos,
    sin,
    norm,
    q_proj,
    o_proj,
    attn_gate,
    ffn_norm,
    gate_proj,
    up_proj,
    down_proj,
    ff_gate,
    eps: float,
):
    """`surgeon.memory.mixin.mixin`: arguments, shapes and result are those documented there; cos and sin are of
    hidden_states' dtype, to which the definition casts them."""
    tokens = op.Flatten(hidden_states, axis=2)
    query = op.Gemm(op.RMSNormalization(tokens, norm, axis=-1, epsilon=eps), q_proj, transB=1)
    minus = op.Constant(value_ints=[-1])
    heads = op.Concat(op.Shape(hidden_states, start=0, end=2), minus, op.Shape(keys, start=3, end=4), axis=0)
    query = op.Transpose(op.Reshape(query, heads), perm=[0, 2, 1, 3])
    query = op.RotaryEmbedding(query, cos, sin, interleaved=0)

    # A token without images attends to padding, and the result is dropped below: no NaN from an empty softmax.
    slots = op.Concat(op.Constant(value_ints=[0, 1, -1]), op.Shape(keys, start=2, end=3), axis=0)
    mask = op.Reshape(memory_mask, slots)  # of a row's tokens alike, or of each
    count = op.ReduceSum(op.Cast(mask, to=INT32.dtype), op.Constant(value_ints=[3]), keepdims=1)
    has_memory = op.Cast(count, to=BOOL.dtype)
    seen = op.Or(mask, op.Not(has_memory))
    one = op.Constant(value_ints=[1])
    seen = op.Expand(seen, op.Concat(one, one, op.Shape(hidden_states, start=1, end=2), one, axis=0))
    retrieved = op.Attention(query, keys, values, seen)
    retrieved = op.Gemm(op.Flatten(op.Transpose(retrieved, perm=[0, 2, 1, 3]), axis=2), o_proj, transB=1)

    attended = op.Add(tokens, op.Mul(op.Tanh(attn_gate), retrieved))
    normed = op.RMSNormalization(attended, ffn_norm, axis=-1, epsilon=eps)
    gate = op.Gemm(normed, gate_proj, transB=1)
    mlp = op.Mul(op.Mul(gate, op.Sigmoid(gate)), op.Gemm(normed, up_proj, transB=1))
    fed = op.Add(attended, op.Mul(op.Tanh(ff_gate), op.Gemm(mlp, down_proj, transB=1)))
    fed = op.Reshape(fed, op.Shape(hidden_states))
    return op.Where(op.Reshape(has_memory, op.Constant(value_ints=[0, -1, 1])), fed, hidden_states)


class _MixinFunction(GraftFunction):
    definition = Mixin
    operator = torch.ops.surgeon.mixin.default

    def call(
        self,
        graft: memory.Mixin,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        memory_mask: Tensor,
        visual_token_mask: Tensor,
        rotary: Rotary | None,
    ) -> Tensor:
        assert rotary is not None
        cos, sin = (part.to(hidden_states.dtype) for part in rotary)
        return mixin(hidden_states, keys, values, memory_mask, cos, sin, *graft.weights(), graft.eps)

    def project(self, graft: Any, visual_embeds: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        """As the graft does, keys rotated by one operator."""
        assert rotary is not None
        normed = graft.norm(visual_embeds)
        heads = (graft.num_heads, graft.head_dim)
        keys = graft.k_proj(normed).unflatten(-1, heads).transpose(1, 2)
        values = graft.v_proj(normed).unflatten(-1, heads).transpose(1, 2)
        cos, sin = (part.to(keys.dtype) for part in rotary)
        return ops.rope(keys, cos, sin), values


FUNCTION = _MixinFunction()
