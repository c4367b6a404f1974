"""Functions are written out under names that say which call they came from."""

from collections.abc import Callable

import onnx
import onnx_ir as ir

from engines import CASES, Case
from exporters.tensorrt.rewrites import InlineFunctions
from pairs import Pair


def test_every_call_is_written_out_and_named(bundle_of: Callable[[Case], Pair]) -> None:
    model = ir.load(bundle_of(CASES[0]).bundle / "decoder.onnx")
    calls = {str(node.name) for node in model.graph if node.domain == "surgeon"}
    assert len(calls) == 2
    rewrite = InlineFunctions()
    assert rewrite(model).modified and rewrite.replaced == 2
    assert not model.functions and all(node.domain == "" for node in model.graph)
    names = [str(node.name) for node in model.graph]
    assert len(set(names)) == len(names)
    assert {f"{call}/Attention" for call in calls} <= set(names)
    assert not any(node.metadata_props for node in model.graph)
    assert not InlineFunctions()(model).modified


def test_what_is_no_call_of_a_function_keeps_its_name() -> None:
    """A fused kernel's node is of the same domain as the graft's function that it stands for."""
    text = """<ir_version: 10, opset_import: ["": 24, "surgeon": 1]>
    graph (float[N] x) => (float[N] y) {
        [layer_1_pvm_text] a = surgeon.pvm_text (x)
        [layer_2] y = surgeon.Twice (a)
    }
    <domain: "surgeon", opset_import: ["": 24]> Twice (b) => (c) { c = Add (b, b) }"""
    model, rewrite = ir.from_proto(onnx.parser.parse_model(text)), InlineFunctions()
    assert rewrite(model).modified and rewrite.replaced == 1
    names = [(node.op_type, node.name) for node in model.graph]
    assert names == [("pvm_text", "layer_1_pvm_text"), ("Add", "layer_2/Add")]
