"""The graphs that TensorRT builds from, after its rewrites, compute what the bundle's own do: every family, pass and
dtype, on the CPU; and the plan says how much memory they will need."""

import itertools
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from checkpoints import FAMILIES
from engines import CASES, Case
from exporters.onnx.manifest import Port
from exporters.onnxruntime.rewrites import EmulateBFloat16
from exporters.tensorrt.plan import make_plan
from exporters.tensorrt.profiles import Limits, Range, split_dimension
from pairs import MAX_LENGTH, MIXIN, PVM, Pair

# both passes in one model: every family, every pass, both dtypes and visibilities, in as few exports as that takes
EVERY = [
    Case(family, MIXIN + PVM, dtype, visibility)
    for family, dtype, visibility in zip(
        FAMILIES, itertools.cycle(("float16", "bfloat16")), itertools.cycle(("all", "causal", "causal")), strict=False
    )
]
COMPARED = [*CASES, *(pytest.param(case, marks=pytest.mark.long) for case in EVERY if case not in CASES)]
"""What engines are built of in test_build.py, and the rest."""
SIZES = {"B": 2, "S": 3, "T": 2, "M": 5, "W": 2, "L": 9}


@pytest.mark.parametrize("case", COMPARED, ids=str)
def test_a_given_graph_equals_the_validated_one(bundle_of: Callable[[Case], Pair], case: Case) -> None:
    pair = bundle_of(case)
    plan = make_plan(pair.bundle, "tensorrt-rtx", Limits())
    assert [graph.name for graph in plan.graphs] == list(pair.manifest.graphs)
    for graph in plan.graphs:
        feeds = {port.name: example(port) for port in pair.manifest.graphs[graph.name].inputs}
        want = run(ir.load(graph.graph), feeds, pair.bundle)
        got = run(graph.model, {port.name: feeds[port.name] for port in graph.inputs}, pair.bundle)
        for port, a, b in zip(graph.outputs, want, got, strict=True):
            assert np.isfinite(a).all() and np.isfinite(b).all(), (graph.name, port.name)
            assert np.abs(a - b).max() <= 2e-3 * np.abs(a).max(), (graph.name, port.name)


def example(port: Port) -> np.ndarray:
    """Inputs that mean something: masks with a hole, a row without images, indices within range."""
    rng = np.random.default_rng(zlib.crc32(port.name.encode()))
    shape = [size if isinstance(size, int) else size_of(size) for size in port.shape]
    if port.dtype == "bool":
        mask = rng.random(shape) < 0.7
        mask[0, 0] = True
        if port.name == "memory_mask":
            mask[-1] = False
            if mask.ndim == 3:
                mask[0, -1] = False  # a token that sees nothing beside others of its row that do
        return mask
    if port.dtype == "int64":
        high = {"window_kv_len": 9, "write_indices": 20, "logits_indices": SIZES["S"]}.get(port.name, 4)
        return rng.integers(1 if port.name == "window_kv_len" else 0, high, shape)
    return rng.standard_normal(shape).astype(np.float32)


def size_of(dimension: str) -> int:
    factor, symbol = split_dimension(dimension)
    return factor * SIZES[symbol]


def run(model: ir.Model, feeds: dict[str, np.ndarray], bundle: Path) -> list[np.ndarray]:
    """A graph of fp16 or bf16 on the CPU, as it is; outputs in fp32."""
    model = ir.from_proto(ir.to_proto(model))
    EmulateBFloat16()(model)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.resolve()))
    data = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    kinds = {"tensor(float16)": np.float16, "tensor(float)": np.float32}
    inputs = {i.name: feeds[i.name].astype(kinds.get(i.type, feeds[i.name].dtype)) for i in session.get_inputs()}
    return [output.astype(np.float32) for output in session.run(None, inputs)]


def test_caches_and_memory_are_those_of_the_largest_request(bundle_of: Callable[[Case], Pair]) -> None:
    pair = bundle_of(CASES[0])
    text = pair.inputs.config.text_config
    plan = make_plan(pair.bundle, "tensorrt-rtx", Limits(batch=Range.of(1, 4), visual_tokens=Range.of(1, 300)))
    # keys and values, in fp16: of every layer, and of two grafts, which have one head for them
    head = 2 * text.head_dim
    assert plan.cache_bytes == text.num_hidden_layers * 2 * 4 * MAX_LENGTH * text.num_key_value_heads * head
    assert plan.memory_bytes == 2 * 2 * 4 * 300 * head
