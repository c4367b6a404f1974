"""The layer report says what became of attention, from what the library logs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from exporters.tensorrt.errors import EngineError
from exporters.tensorrt.layers import LayerReport, load_report, report

PARSED = {"kinds": {"ATTENTION_OUTPUT": 1}, "special": [["ATTENTION_OUTPUT", "a_AttentionOutput", "[ONNX Layer: a]"]]}


def kernel(name: str, *nodes: str) -> str:
    return f"Name: {name}, LayerType: kgen, Inputs: [ x ], TacticName: t, StreamId: 0, Metadata: " + "".join(
        f"[ONNX Layer: {node}]" for node in nodes
    )


def attention(dtype: int = TensorProto.FLOAT16, nonpad: bool = False) -> onnx.ModelProto:
    """y = Attention(q, k, v) of 4 heads; nonpad: with `nonpad_kv_seqlen`."""
    sizes = {"q": ["B", 4, "S", 32], "k": ["B", 4, "K", 32], "v": ["B", 4, "K", 32]}
    inputs = [helper.make_tensor_value_info(name, dtype, shape) for name, shape in sizes.items()]
    names = ["q", "k", "v"]
    if nonpad:
        inputs.append(helper.make_tensor_value_info("n", TensorProto.INT64, ["B"]))
        names += ["", "", "", "n"]
    node = helper.make_node("Attention", names, ["y"], name="a")
    outputs = [helper.make_tensor_value_info("y", dtype, sizes["q"])]
    graph = helper.make_graph([node], "g", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)


SHAPES: Any = {name: ([1, 4, 1, 32], [1, 4, 8, 32], [2, 4, 64, 32]) for name in ("q", "k", "v")}


def graph() -> ir.Model:
    return ir.from_proto(attention())


@pytest.mark.parametrize(
    ("log", "fused"),
    [
        ([kernel("_gemm_mha_v2_myl1_8", "a")], True),
        (
            [kernel("_gemv_mha_v1_myl1_8", "a"), kernel("_gemm_mha_v2_myl3_8", "a"), kernel("__myl_Move_myl3_9", "a")],
            True,
        ),
        (
            [kernel("__fc10_myl1_2", "a"), kernel("__myl_MaxrSubExpSum_myl1_3", "a"), kernel("__fc11_myl1_4", "a")],
            False,
        ),
        # fused in one profile, fallen apart in the other
        ([kernel("_gemv_mha_v1_myl1_8", "a"), kernel("__fc10_myl3_2", "a"), kernel("__fc11_myl3_4", "a")], False),
        # another attention's kernel
        ([kernel("_gemm_mha_v2_myl1_8", "b"), kernel("__fc10_myl1_2", "a")], False),
        ([kernel("_gemm_mha_v2_myl1_8", "b")], False),
    ],
    ids=["fused", "two profiles", "apart", "apart in one profile", "another", "unknown"],
)
def test_attention_is_fused_where_a_kernel_is_in_every_profile(log: list[str], fused: bool) -> None:
    graph_layers = report(graph(), PARSED, "Layers:\n" + "\n".join(log) + "\n")
    (operator,) = graph_layers.operators
    assert (operator.node, operator.fused, operator.reason is None) == ("a", fused, fused)
    assert graph_layers.count("Attention") == (int(fused), 1)
    assert not any(
        character.isdigit() for name in operator.kernels for character in name.replace("_v2", "").replace("_v1", "")
    )
    warnings = LayerReport(graphs={"decoder": graph_layers}).warnings()
    assert len(warnings) == (not fused)
    if not fused:
        assert "decoder: 1 of 1 attention(s) fell apart into primitives: a" in warnings[0]


def test_attention_that_the_parser_took_apart() -> None:
    (operator,) = report(graph(), {"kinds": {"SOFTMAX": 1}, "special": []}, "").operators
    assert not operator.fused and operator.reason == "the parser made primitives of it"


def test_without_a_log_the_network_is_all_there_is() -> None:
    (operator,) = report(graph(), PARSED, "").operators
    assert operator.fused and operator.kernels == []
    named = {"kinds": {}, "special": [["ATTENTION_OUTPUT", "a_AttentionOutput", ""]]}
    assert report(graph(), named, "").operators[0].fused


def test_what_the_library_really_does(build_graph: Callable[..., Any]) -> None:
    """fp16 attention becomes one kernel; fp32 falls apart, and the report says so."""
    for dtype, fused in ((TensorProto.FLOAT16, True), (TensorProto.FLOAT, False)):
        outcome, log = build_graph(attention(dtype), **SHAPES)
        (operator,) = report(ir.from_proto(attention(dtype)), outcome.last("parsed"), log).operators
        assert operator.fused == fused, log


def test_an_input_that_the_parser_leaves_out_is_an_error(build_graph: Callable[..., Any], tmp_path: Path) -> None:
    outcome, _ = build_graph(attention(nonpad=True), **SHAPES, n=([1], [1], [2]))
    failed = outcome.last("failed")
    assert failed["stage"] == "unused" and any("n" in reason.split() for reason in failed["reasons"])
    assert not (tmp_path / "engine").read_bytes(), "the library is stopped as soon as it says so"


def test_a_graph_that_the_parser_does_not_take(build_graph: Callable[..., Any]) -> None:
    model = attention()
    model.graph.node[0].attribute.append(helper.make_attribute("softcap", 30.0))
    failed = build_graph(model, **SHAPES)[0].last("failed")
    assert failed["stage"] == "parse" and "softcap" in failed["reasons"][0]


def test_a_damaged_report(tmp_path: Path) -> None:
    (tmp_path / "layers.json").write_text("{}")
    with pytest.raises(EngineError, match="layer report is damaged"):
        load_report(tmp_path / "layers.json")
