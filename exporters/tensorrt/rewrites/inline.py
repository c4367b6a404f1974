"""Functions of the project's domain written out, so that the other rewrites and the layer report see their nodes."""

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from exporters.onnx.rewrite import Rewrite

_CALL = "surgeon.call"


class InlineFunctions(Rewrite):
    """Every call of a model-local function -> its nodes, named `<the call's name>/<the node's operator>`.

    TensorRT's parser would inline them too, but under names that say nothing and repeat for every call.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        self.replaced = 0
        calls = [node for node in model.graph if node.op_identifier() in model.functions]
        for node in calls:
            node.metadata_props[_CALL] = str(node.name)  # the inliner hands it to the nodes that take its place
        if calls:
            InlinePass()(model)
        counts: dict[str, int] = {}
        for node in model.graph:
            call = node.metadata_props.pop(_CALL, None)
            if call is not None:
                name = f"{call}/{node.op_type}"
                counts[name] = counts.get(name, 0) + 1
                node.name = name if counts[name] == 1 else f"{name}_{counts[name]}"
        self.replaced = len(calls)
        return ir.passes.PassResult(model, modified=bool(calls))
