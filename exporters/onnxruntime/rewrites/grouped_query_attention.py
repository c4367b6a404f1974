"""Cached causal attention as ONNX Runtime's own operator."""

from typing import NamedTuple

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tape import Tape

from exporters.onnx.rewrite import Rewrite, is_standard
from exporters.onnxruntime.rewrites._nodes import (
    CONTRIB,
    attention_scale,
    copy_dtype,
    int_attribute,
    sets_only,
    static_size,
    take_over,
)


class GroupedQueryAttention(Rewrite):
    """Cached causal Attention -> com.microsoft.GroupQueryAttention.

    `Attention(q, TensorScatter(past_k, k, w), TensorScatter(past_v, v, w), mask)` costs O(Smax) on ONNX Runtime,
    however short the rows are; the contrib operator reads the filled slots alone and writes the cache in place when
    past and present are one buffer. It has no mask: the mask is *evaluated* on examples, and nothing is replaced unless
    a token written at slot j sees slots 0..j. It runs rows of different lengths, but on a cache that is not empty
    several new tokens a row only in batches of one.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        self.replaced = 0
        causal: dict[tuple[ir.Value, ir.Value], bool] = {}
        lengths: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        for node in list(model.graph):
            parts = _cached_attention(node)
            if parts is None:
                continue
            query, keys, values, mask, write_indices = parts
            heads = _heads(query, keys.outputs[0])
            if heads is None:
                continue
            if (mask, write_indices) not in causal:
                causal[mask, write_indices] = _is_causal(model, mask, write_indices, heads.max_length)
            if causal[mask, write_indices]:
                self._replace(model, node, query, keys, values, heads, write_indices, lengths)
                self.replaced += 1
        if self.replaced:
            model.opset_imports[CONTRIB] = 1
            RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=self.replaced > 0)

    def _replace(
        self,
        model: ir.Model,
        node: ir.Node,
        query: ir.Value,
        keys: ir.Node,
        values: ir.Node,
        heads: "_Heads",
        write_indices: ir.Value,
        lengths: dict[ir.Value, tuple[ir.Value, ir.Value]],
    ) -> None:
        tape = Tape()
        new = [_packed(tape, model, value) for value in (query, keys.inputs[1], values.inputs[1])]
        for new_node in tape.nodes:
            copy_dtype(new_node.outputs[0], query)
        if write_indices not in lengths:
            lengths[write_indices] = _lengths(tape, model, write_indices, new[0])
        attended, *present = tape.op_multi_out(
            "GroupQueryAttention",
            [*new, keys.inputs[0], values.inputs[0], *lengths[write_indices]],
            {
                "num_heads": heads.query,
                "kv_num_heads": heads.key_value,
                "scale": attention_scale(node, heads.head_dim),
            },
            domain=CONTRIB,
            num_outputs=3,
        )
        by_head = tape.op("Reshape", [attended, _constant(model, [0, 0, heads.query, heads.head_dim])])
        output = node.outputs[0]
        swapping = [user for user in output.consumers() if _swaps_heads(user)]
        if len(swapping) == len(output.consumers()) and not output.is_graph_output():
            replacements = [(user.outputs[0], by_head) for user in swapping]
        else:
            swapping = []
            replacements = [(output, tape.op("Transpose", [by_head], {"perm": [0, 2, 1, 3]}))]
        replacements += [(scatter.outputs[0], cache) for scatter, cache in zip((keys, values), present, strict=True)]
        for value in (attended, *present, by_head, replacements[0][1]):
            copy_dtype(value, query)
        model.graph.insert_before(node, tape.nodes)
        for old, replacement in replacements:
            take_over(old, replacement, but=[node])
        model.graph.remove([*swapping, node, keys, values], safe=True)


def _cached_attention(node: ir.Node) -> tuple[ir.Value, ir.Node, ir.Node, ir.Value, ir.Value] | None:
    """query, the scatters of keys and values, mask and write indices of a cached attention; None for any other node."""
    if not is_standard(node, "Attention") or len(node.outputs) != 1 or len(node.inputs) < 4:
        return None
    query, keys, values, mask, *rest = node.inputs
    if query is None or keys is None or values is None or mask is None or any(v is not None for v in rest):
        return None
    if not sets_only(node, {"scale"}):
        return None
    scatters = [keys.producer(), values.producer()]
    for scatter in scatters:
        if scatter is None or not is_standard(scatter, "TensorScatter") or len(scatter.inputs) != 3:
            return None
        mode = scatter.attributes.get_string("mode", "linear")
        if mode != "linear" or int_attribute(scatter, "axis") != 2:
            return None
        if scatter.outputs[0].consumers() != (node,):
            return None
    key_scatter, value_scatter = scatters
    assert key_scatter is not None and value_scatter is not None
    write_indices = key_scatter.inputs[2]
    if write_indices is None or write_indices is not value_scatter.inputs[2]:
        return None
    return query, key_scatter, value_scatter, mask, write_indices


class _Heads(NamedTuple):
    query: int
    key_value: int
    head_dim: int
    max_length: int


def _heads(query: ir.Value, cache: ir.Value) -> _Heads | None:
    """The sizes of an attention, [B, H, S, hd] over [B, Hkv, Smax, hd]; None where one is unknown or does not fit."""
    if query.shape is None or cache.shape is None or len(query.shape) != 4 or len(cache.shape) != 4:
        return None
    sizes = (query.shape[1], cache.shape[1], query.shape[3], cache.shape[2])
    if not all(isinstance(n, int) for n in sizes) or query.shape[3] != cache.shape[3]:
        return None
    heads = _Heads(*map(static_size, sizes))
    return heads if heads.query % heads.key_value == 0 else None


def _is_causal(model: ir.Model, mask: ir.Value, write_indices: ir.Value, max_length: int) -> bool:
    """Whether the mask lets a token written at slot j see slots 0..j of its row, by evaluating it."""
    inputs = [value for value in model.graph.inputs if value in _ancestors(mask)]
    if write_indices not in inputs:
        return False
    names = [str(value.name) for value in inputs]
    part = ir.Model(ir.convenience.extract(model.graph, names, [str(mask.name)]), ir_version=model.ir_version)
    quiet = ort.SessionOptions()
    quiet.log_severity_level = 3
    session = ort.InferenceSession(ir.to_proto(part).SerializeToString(), quiet, providers=["CPUExecutionProvider"])
    for starts, length in (([0, 0, 0], 1), ([0, max_length // 2, max_length - 1], 1), ([0, 1, 0], max_length - 1)):
        sizes = {"B": len(starts), "S": length}
        feeds = {}
        for value in inputs:
            if value is write_indices:
                feeds[str(value.name)] = np.array(starts, dtype=np.int64)
                continue
            assert value.shape is not None and value.dtype is not None
            shape = [n if isinstance(n, int) else sizes.get(str(n)) for n in value.shape]
            if None in shape:
                return False
            feeds[str(value.name)] = np.zeros(shape, dtype=value.dtype.numpy())  # type: ignore[arg-type]
        slots = np.arange(max_length)
        expected = slots <= (np.array(starts)[:, None] + np.arange(length))[..., None]
        actual = session.run(None, feeds)[0]
        if actual.dtype != np.bool_ or not np.array_equal(actual, expected[:, None]):
            return False
    return True


def _ancestors(value: ir.Value) -> set[ir.Value]:
    ancestors, waiting = {value}, [value]
    while waiting:
        producer = waiting.pop().producer()
        for source in producer.inputs if producer is not None else ():
            if source is not None and source not in ancestors:
                ancestors.add(source)
                waiting.append(source)
    return ancestors


def _lengths(tape: Tape, model: ir.Model, write_indices: ir.Value, query: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Each row's last slot in use, int32 [B], and the longest row's length, int32 scalar, after this call.
    query [B, S, H * hd]."""
    new = tape.op("Shape", [query], {"start": 1, "end": 2})
    ends = tape.op("Add", [write_indices, new])
    last = tape.op("Sub", [ends, _constant(model, [1])])
    total = tape.op("ReduceMax", [ends], {"keepdims": 0})
    for value in (new, ends, last, total):
        value.dtype = ir.DataType.INT64
    narrow = [tape.op("Cast", [value], {"to": int(ir.DataType.INT32)}) for value in (last, total)]
    for value in narrow:
        value.dtype = ir.DataType.INT32
    return narrow[0], narrow[1]


def _packed(tape: Tape, model: ir.Model, value: ir.Value | None) -> ir.Value:
    """[B, H, S, hd] as [B, S, H * hd], by undoing the Transpose that made it where there is one, through rotary
    embedding, which has a form for packed heads."""
    assert value is not None
    producer = value.producer()
    if producer is not None and _swaps_heads(producer):
        return tape.op("Reshape", [producer.inputs[0], _constant(model, [0, 0, -1])])
    if producer is not None and is_standard(producer, "RotaryEmbedding") and len(producer.inputs) == 3:
        x, cos, sin = producer.inputs
        if x is not None and x.shape is not None and len(x.shape) == 4 and sets_only(producer, {"interleaved"}):
            interleaved = int_attribute(producer, "interleaved")
            attributes = {"interleaved": interleaved, "num_heads": static_size(x.shape[1])}
            return tape.op("RotaryEmbedding", [_packed(tape, model, x), cos, sin], attributes)
    swapped = tape.op("Transpose", [value], {"perm": [0, 2, 1, 3]})
    return tape.op("Reshape", [swapped, _constant(model, [0, 0, -1])])


def _swaps_heads(node: ir.Node) -> bool:
    return is_standard(node, "Transpose") and list(node.attributes.get_ints("perm", ())) == [0, 2, 1, 3]


def _constant(model: ir.Model, numbers: list[int]) -> ir.Value:
    """An int64 initialiser, shared by all that ask for the same numbers."""
    name = "ort_rewrites." + "_".join(map(str, numbers))
    existing = model.graph.initializers.get(name)
    if existing is not None:
        return existing
    value = ir.Value(name=name, const_value=ir.tensor(np.array(numbers, dtype=np.int64), name=name))
    model.graph.register_initializer(value)
    return value
