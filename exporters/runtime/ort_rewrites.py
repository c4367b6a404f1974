"""Rewrites of a bundle's standard graphs for ONNX Runtime, made in memory when a session is.

Each is an onnx-ir pass that says in `replaced` how many nodes it replaced, and leaves alone what it does not know.
"""

from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes.common import InlinePass, RemoveUnusedNodesPass, ShapeInferencePass
from onnx_ir.tape import Tape

from surgeon.errors import BundleError

CONTRIB = "com.microsoft"
REDUCED = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class OrtRewrite(ir.passes.InPlacePass):
    """A pass that counts what it replaced."""

    replaced = 0


class GroupedQueryAttention(OrtRewrite):
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
            found = _cached_attention(node)
            if found is None:
                continue
            query, keys, values, mask, write_indices = found
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
        for made in tape.nodes:
            _copy_dtype(made.outputs[0], query)
        if write_indices not in lengths:
            lengths[write_indices] = _lengths(tape, model, write_indices, new[0])
        attended, *present = tape.op_multi_out(
            "GroupQueryAttention",
            [*new, keys.inputs[0], values.inputs[0], *lengths[write_indices]],
            {
                "num_heads": heads.query,
                "kv_num_heads": heads.key_value,
                "scale": _scale(node, heads.head_dim),
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
            _copy_dtype(value, query)
        model.graph.insert_before(node, tape.nodes)
        for old, replacement in replacements:
            _take_over(old, replacement, but=[node])
        model.graph.remove([*swapping, node, keys, values], safe=True)


class PackedMultiHeadAttention(OrtRewrite):
    """Attention over packed heads [B, S, H * hd] without a mask -> com.microsoft.MultiHeadAttention.

    ONNX Runtime's CPU provider computes the standard operator with an S x S matrix for each head, and the contrib
    operator in tiles: half the time, and at 16,384 patches 0.24 GiB instead of 17.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        self.replaced = 0
        for node in list(model.graph):
            heads = _int(node, "q_num_heads")
            if not _is_standard(node, "Attention") or heads == 0 or len(node.outputs) != 1:
                continue
            if any(value is not None for value in node.inputs[3:]):
                continue
            query = node.inputs[0]
            if _int(node, "kv_num_heads") != heads or query is None or query.shape is None:
                continue
            if not _says_only(node, {"q_num_heads", "kv_num_heads", "scale"}):
                continue
            width = query.shape[2]
            if "scale" not in node.attributes and not isinstance(width, int):
                continue
            scale = node.attributes.get_float("scale", 0.0) or _scale(node, _static(width) // heads)
            tape = Tape()
            attended = tape.op(
                "MultiHeadAttention", node.inputs[:3], {"num_heads": heads, "scale": scale}, domain=CONTRIB
            )
            model.graph.insert_before(node, tape.nodes)
            _take_over(node.outputs[0], attended)
            model.graph.remove(node, safe=True)
            self.replaced += 1
        if self.replaced:
            model.opset_imports[CONTRIB] = 1
        return ir.passes.PassResult(model, modified=self.replaced > 0)


class EmulateBFloat16(OrtRewrite):
    """A bf16 graph -> one that ONNX Runtime's CPU provider, which computes nothing in bf16, can run.

    Values become fp32 tensors that hold bf16 numbers: every operator computes in fp32 and its result is rounded to bf16
    (Cast to bf16 and back), as a bf16 device rounds it. Caches, the memory and all other inputs and outputs are fp32
    with it; callers pass inputs that are bf16 numbers. Operators that round more than once inside (RMSNormalization
    before its scale, Attention's softmax) round once here, so a device agrees closely, not in every bit.

    It costs: twice the memory, because weights are cast to fp32 copies when the session loads (embedding tables are
    not: rows are looked up in bf16, then cast); two casts an operator; and nothing of bf16's speed. Functions are
    inlined, so that their inner values are rounded too. It is for checking numbers, not for serving.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Raises BundleError where the type of a function's inner value cannot be inferred."""
        self.replaced = 0
        graph = model.graph
        if not any(value.dtype == ir.DataType.BFLOAT16 for value in _values(graph)):
            return ir.passes.PassResult(model, modified=False)
        if model.functions:
            InlinePass()(model)
        ShapeInferencePass()(model)
        reduced = {value for value in _values(graph) if value.dtype == ir.DataType.BFLOAT16}
        unknown = [str(value.name) for value in _values(graph) if value.dtype is None]
        if unknown:
            raise BundleError(f"the types of {len(unknown)} values, {unknown[0]} the first, cannot be inferred")
        for value in graph.inputs:
            if value in reduced:
                value.dtype = ir.DataType.FLOAT
        for value in [v for v in graph.initializers.values() if v in reduced]:
            table_rows = [use.node for use in value.uses() if use.node.op_type == "Gather" and use.idx == 0]
            for node in table_rows:
                reduced.remove(node.outputs[0])
                self._widen(graph, node.outputs[0], node)
            if len(table_rows) < len(value.uses()):
                self._widen(graph, value, None, but=table_rows)
        for node in list(graph):
            if _is_standard(node, "Cast") and _int(node, "to") == ir.DataType.BFLOAT16:
                if node.outputs[0] not in reduced:
                    continue  # made by this pass
                node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
            for output in node.outputs:
                if output not in reduced:
                    continue
                if node.op_type in ("Constant", "ConstantOfShape"):
                    self._widen(graph, output, node)
                    continue
                output.dtype = ir.DataType.FLOAT
                if not _moves_data(node, output):
                    self._round(graph, node, output)
        return ir.passes.PassResult(model, modified=True)

    def _widen(self, graph: ir.Graph, value: ir.Value, producer: ir.Node | None, but: Collection[ir.Node] = ()) -> None:
        """A value that stays bf16 is read as fp32, except by the nodes `but`."""
        cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})
        cast.outputs[0].dtype, cast.outputs[0].shape = ir.DataType.FLOAT, value.shape
        if producer is None:
            graph.insert_before(graph[0], cast)
        else:
            graph.insert_after(producer, cast)
        _take_over(value, cast.outputs[0], but=[*but, cast])
        self.replaced += 1

    def _round(self, graph: ir.Graph, node: ir.Node, output: ir.Value) -> None:
        narrow = ir.node("Cast", [output], {"to": int(ir.DataType.BFLOAT16)})
        wide = ir.node("Cast", narrow.outputs, {"to": int(ir.DataType.FLOAT)})
        narrow.outputs[0].dtype, narrow.outputs[0].shape = ir.DataType.BFLOAT16, output.shape
        wide.outputs[0].dtype, wide.outputs[0].shape = ir.DataType.FLOAT, output.shape
        graph.insert_after(node, [narrow, wide])
        _take_over(output, wide.outputs[0], but=[narrow])
        self.replaced += 1


_MOVES_DATA = frozenset(
    (
        "Concat",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "TensorScatter",
        "Transpose",
        "Unsqueeze",
        "Where",
    )
)
"""Operators whose results are numbers that were there before: nothing to round."""


def _moves_data(node: ir.Node, output: ir.Value) -> bool:
    if node.op_type == "GroupQueryAttention":
        return output is not node.outputs[0]  # the caches
    return node.op_type in _MOVES_DATA


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Every value that is used."""
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from (value for value in node.outputs if value.uses() or value.is_graph_output())


class Float32Boundary(OrtRewrite):
    """Inputs and outputs in fp16 or bf16 -> fp32, cast inside the graph, but for those that `keep(name)` holds back:
    what the host computes with is fp32, what stays on the device (caches, memory) is as the graph has it."""

    def __init__(self, keep: Callable[[str], bool]) -> None:
        super().__init__()
        self.keep = keep

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        self.replaced = 0
        graph = model.graph
        for value in graph.inputs:
            if value.dtype in REDUCED and not self.keep(str(value.name)):
                cast = ir.node("Cast", [value], {"to": int(value.dtype)})
                cast.outputs[0].dtype, cast.outputs[0].shape = value.dtype, value.shape
                graph.insert_before(graph[0], cast)
                _take_over(value, cast.outputs[0], but=[cast])
                value.dtype = ir.DataType.FLOAT
                self.replaced += 1
        for value in list(graph.outputs):
            if value.dtype in REDUCED and not self.keep(str(value.name)):
                cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})
                cast.outputs[0].dtype = ir.DataType.FLOAT
                graph.append(cast)
                # a value inside the graph that is also looked at from outside is still read as it is
                _take_over(value, cast.outputs[0], but=[use.node for use in value.uses()])
                self.replaced += 1
        return ir.passes.PassResult(model, modified=self.replaced > 0)


# -- what attention looks like -----------------------------------------------------------------------------------
def _cached_attention(node: ir.Node) -> tuple[ir.Value, ir.Node, ir.Node, ir.Value, ir.Value] | None:
    """query, the scatters of keys and values, mask and write indices of a cached attention; None for any other node."""
    if not _is_standard(node, "Attention") or len(node.outputs) != 1 or len(node.inputs) < 4:
        return None
    query, keys, values, mask, *rest = node.inputs
    if query is None or keys is None or values is None or mask is None or any(v is not None for v in rest):
        return None
    if not _says_only(node, {"scale"}):
        return None
    scatters = [keys.producer(), values.producer()]
    for scatter in scatters:
        if scatter is None or not _is_standard(scatter, "TensorScatter") or len(scatter.inputs) != 3:
            return None
        mode = scatter.attributes.get_string("mode", "linear")
        if mode != "linear" or _int(scatter, "axis") != 2:
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
    found = _Heads(*map(_static, sizes))
    return found if found.query % found.key_value == 0 else None


def _static(size: int | ir.SymbolicDim) -> int:
    assert isinstance(size, int)
    return size


def _is_causal(model: ir.Model, mask: ir.Value, write_indices: ir.Value, max_length: int) -> bool:
    """Whether the mask lets a token written at slot j see slots 0..j of its row, found by evaluating it."""
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
        found = session.run(None, feeds)[0]
        if found.dtype != np.bool_ or not np.array_equal(found, expected[:, None]):
            return False
    return True


def _ancestors(value: ir.Value) -> set[ir.Value]:
    seen, waiting = {value}, [value]
    while waiting:
        producer = waiting.pop().producer()
        for source in producer.inputs if producer is not None else ():
            if source is not None and source not in seen:
                seen.add(source)
                waiting.append(source)
    return seen


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
    if producer is not None and _is_standard(producer, "RotaryEmbedding") and len(producer.inputs) == 3:
        x, cos, sin = producer.inputs
        if x is not None and x.shape is not None and len(x.shape) == 4 and _says_only(producer, {"interleaved"}):
            interleaved = _int(producer, "interleaved")
            attributes = {"interleaved": interleaved, "num_heads": _static(x.shape[1])}
            return tape.op("RotaryEmbedding", [_packed(tape, model, x), cos, sin], attributes)
    swapped = tape.op("Transpose", [value], {"perm": [0, 2, 1, 3]})
    return tape.op("Reshape", [swapped, _constant(model, [0, 0, -1])])


# -- small things about nodes ------------------------------------------------------------------------------------
def _is_standard(node: ir.Node, op_type: str) -> bool:
    return node.op_type == op_type and node.domain in ("", "ai.onnx")


def _swaps_heads(node: ir.Node) -> bool:
    return _is_standard(node, "Transpose") and list(node.attributes.get_ints("perm", ())) == [0, 2, 1, 3]


def _says_only(node: ir.Node, known: set[str]) -> bool:
    """Whether every other attribute is zero, which is what those of Attention and RotaryEmbedding are by default."""
    return all(name in known or attribute.value in (0, 0.0) for name, attribute in node.attributes.items())


def _int(node: ir.Node, name: str) -> int:
    attribute = node.attributes.get(name)
    return 0 if attribute is None else attribute.as_int()


def _scale(node: ir.Node, head_dim: int) -> float:
    return float(node.attributes.get_float("scale", 0.0) or head_dim**-0.5)


def _constant(model: ir.Model, numbers: list[int]) -> ir.Value:
    """An int64 initialiser, shared by all that ask for the same numbers."""
    name = "ort_rewrites." + "_".join(map(str, numbers))
    known = model.graph.initializers.get(name)
    if known is not None:
        return known
    value = ir.Value(name=name, const_value=ir.tensor(np.array(numbers, dtype=np.int64), name=name))
    model.graph.register_initializer(value)
    return value


def _take_over(old: ir.Value, new: ir.Value, but: Collection[ir.Node] = ()) -> None:
    """`new` is used wherever `old` was, graph outputs and the name included; the nodes `but` keep reading `old`."""
    new.shape = new.shape or old.shape
    if new.dtype is None:
        _copy_dtype(new, old)
    for use in list(old.uses()):
        if use.node not in but:
            use.node.replace_input_with(use.idx, new)
    if old.is_graph_output():
        outputs = old.graph.outputs  # type: ignore[union-attr]
        for i, output in enumerate(outputs):
            if output is old:
                outputs[i] = new
        new.name, old.name = old.name, f"{old.name}.inner"


def _copy_dtype(new: ir.Value, old: ir.Value) -> None:
    """Not the type itself, an object that both values would share."""
    if old.dtype is not None:
        new.dtype = old.dtype
