"""vision.onnx: one image's patches -> its visual embeddings, as the family writes its tower out."""

import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from exporters.onnx.assembly import single
from exporters.onnx.trace import Program
from surgeon.families import Family, VisionExport


def vision_graph(family: Family, model: PreTrainedModel, dtype: torch.dtype) -> ir.Model:
    """The vision tower and projector of `model`, which is on the meta device and of `dtype`."""
    export = family.vision_export(model, dtype)
    return single("vision", program_of(export), export.parameters)


def program_of(export: VisionExport) -> Program:
    """What a family wrote out for export, to be traced."""
    return Program(
        module=export.module,
        example=export.example,
        dynamic_shapes=export.dynamic_shapes,
        input_names=list(export.example),
        output_names=export.output_names,
        constants=export.constants,
    )
