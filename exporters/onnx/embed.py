"""embed.onnx: token ids -> embeddings."""

import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from exporters.onnx.dtypes import ir_dtype
from exporters.onnx.functions import IR_VERSION, OPSET
from exporters.onnx.trace import parameter_names


def embed_graph(model: PreTrainedModel, dtype: torch.dtype) -> ir.Model:
    """The embedding table of `model`, which is on the meta device; one Gather, so there is nothing to trace."""
    table = model.get_input_embeddings()
    name = next(iter(parameter_names(table, model).values()))
    vocabulary, width = table.weight.shape
    weight = ir.val(name, ir_dtype(dtype), [vocabulary, width])
    input_ids = ir.val("input_ids", ir.DataType.INT64, ["B", "S"])
    gather = ir.node("Gather", [weight, input_ids], {"axis": 0}, name="node_inputs_embeds")
    output = gather.outputs[0]
    output.name, output.type, output.shape = "inputs_embeds", weight.type, ir.Shape(["B", "S", width])
    graph = ir.Graph([input_ids], [output], nodes=[gather], name="embed", opset_imports={"": OPSET})
    graph.initializers.add(weight)
    return ir.Model(graph, ir_version=IR_VERSION)
