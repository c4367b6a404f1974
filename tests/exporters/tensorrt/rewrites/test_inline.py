"""Functions are written out under names that say which call they came from."""

from collections.abc import Callable

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
