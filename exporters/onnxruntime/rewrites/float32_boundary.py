"""fp32 where the host meets a graph that computes in less."""

from collections.abc import Callable

import onnx_ir as ir

from exporters.onnx.rewrite import Rewrite
from exporters.onnxruntime.rewrites._nodes import take_over

REDUCED = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class Float32Boundary(Rewrite):
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
                take_over(value, cast.outputs[0], but=[cast])
                value.dtype = ir.DataType.FLOAT
                self.replaced += 1
        for value in list(graph.outputs):
            if value.dtype in REDUCED and not self.keep(str(value.name)):
                cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})
                cast.outputs[0].dtype = ir.DataType.FLOAT
                graph.append(cast)
                # a value inside the graph that is also looked at from outside is still read as it is
                take_over(value, cast.outputs[0], but=[use.node for use in value.uses()])
                self.replaced += 1
        return ir.passes.PassResult(model, modified=self.replaced > 0)
