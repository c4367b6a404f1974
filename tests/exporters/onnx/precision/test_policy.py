"""Softmax and the gates' tanh compute in fp32 in every reduced graph, also inside functions."""

from collections.abc import Callable

import onnx_ir as ir
import pytest
import torch
from onnx_ir.passes.common import InlinePass, ShapeInferencePass

from exporters.onnx.precision.policy import FLOAT32_OPERATORS
from pairs import MIXIN, PVM, Pair

Export = Callable[..., Pair]


def nodes(pair: Pair, graph: str) -> list[ir.Node]:
    """A graph's nodes, functions inlined and types known."""
    model = ir.load(pair.bundle / f"{graph}.onnx")
    InlinePass()(model)
    ShapeInferencePass()(model)
    return list(model.graph)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.long)])
def test_they_read_and_write_fp32(export: Export, dtype: torch.dtype) -> None:
    pair = export("ovis2", MIXIN, dtype, visibility="causal")
    operators = [n for graph in ("vision", "decoder") for n in nodes(pair, graph) if n.op_type in FLOAT32_OPERATORS]
    assert {node.op_type for node in operators} == {"Softmax", "Tanh"}
    for node in operators:
        assert node.inputs[0] is not None and node.inputs[0].dtype == node.outputs[0].dtype == ir.DataType.FLOAT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_keep_statistics_in_fp32_and_attention_its_own_inputs(export: Export, dtype: torch.dtype) -> None:
    pair = export("qwen3_vl", MIXIN + PVM, dtype)
    reduced = {torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16}[dtype]
    for graph in ("vision", "memory", "decoder"):
        for node in nodes(pair, graph):
            if node.op_type in ("RMSNormalization", "LayerNormalization"):
                assert node.attributes.get_int("stash_type", 1) == ir.DataType.FLOAT
            if node.op_type == "Attention":
                # TensorRT refuses the attribute, and fp32 inputs
                assert "softmax_precision" not in node.attributes
                assert all(value is not None and value.dtype == reduced for value in node.inputs[:3])
            if node.op_type in ("Cos", "Sin"):
                assert node.outputs[0].dtype == ir.DataType.FLOAT


def test_an_fp32_graph_has_no_casts_for_it(export: Export) -> None:
    for graph in ("vision", "decoder"):
        for node in nodes(export("ovis2", MIXIN), graph):
            if node.op_type in FLOAT32_OPERATORS:
                producer = node.inputs[0].producer()  # type: ignore[union-attr]
                assert producer is None or producer.op_type != "Cast"
