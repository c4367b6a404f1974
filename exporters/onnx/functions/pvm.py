"""Persistent Visual Memory's branch: `surgeon.memory.pvm` as a function of the domain."""

import torch
from onnxscript import BOOL, INT32, script
from torch import Tensor

from exporters.onnx.functions._base import GraftFunction, domain, op
from exporters.operators.pvm import persistent_visual_memory
from surgeon.memory.pvm import PersistentVisualMemory as PVM
from surgeon.memory.rotary import Rotary


@script(domain, default_opset=op)  # type: ignore[untyped-decorator]
def PersistentVisualMemory(  # type: ignore[no-untyped-def]
    hidden_states,
    keys,
    values,
    memory_mask,
    visual_token_mask,
    text_proj,
    input_norm,
    q_proj,
    q_norm,
    o_proj,
    post_attention_norm,
    gate_proj,
    up_proj,
    down_proj,
    output_proj,
    alpha,
    eps: float,
):
    """`surgeon.memory.pvm.persistent_visual_memory`: arguments, shapes and result are those documented there."""
    query = op.Gemm(op.Flatten(hidden_states, axis=2), text_proj, transB=1)
    query = op.RMSNormalization(query, input_norm, axis=-1, epsilon=eps)
    query = op.Gemm(query, q_proj, transB=1)
    heads = op.Concat(op.Shape(hidden_states, start=0, end=2), op.Constant(value_ints=[-1]), op.Shape(q_norm), axis=0)
    query = op.RMSNormalization(op.Reshape(query, heads), q_norm, axis=-1, epsilon=eps)
    query = op.Transpose(query, perm=[0, 2, 1, 3])

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

    normed = op.RMSNormalization(retrieved, post_attention_norm, axis=-1, epsilon=eps)
    gate = op.Gemm(normed, gate_proj, transB=1)
    mlp = op.Mul(op.Mul(gate, op.Sigmoid(gate)), op.Gemm(normed, up_proj, transB=1))
    retrieved = op.Add(retrieved, op.Gemm(mlp, down_proj, transB=1))

    # The last norm has no weight of its own: alpha, repeated, is its scale.
    injection = op.Gemm(retrieved, output_proj, transB=1)
    scale = op.Expand(alpha, op.Shape(hidden_states, start=2, end=3))
    injection = op.RMSNormalization(injection, scale, axis=-1, epsilon=eps)
    injection = op.Reshape(injection, op.Shape(hidden_states))
    has_memory = op.Reshape(has_memory, op.Constant(value_ints=[0, -1]))
    gets_memory = op.Reshape(op.And(has_memory, op.Not(visual_token_mask)), op.Constant(value_ints=[0, 0, 1]))
    return op.Where(gets_memory, injection, op.CastLike(op.Constant(value_float=0.0), injection))


class _PVMFunction(GraftFunction):
    definition = PersistentVisualMemory
    operator = torch.ops.surgeon.persistent_visual_memory.default

    def call(
        self,
        graft: PVM,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        memory_mask: Tensor,
        visual_token_mask: Tensor,
        rotary: Rotary | None,
    ) -> Tensor:
        return persistent_visual_memory(
            hidden_states, keys, values, memory_mask, visual_token_mask, *graft.weights(), graft.eps
        )


FUNCTION = _PVMFunction()
