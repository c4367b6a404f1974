"""short_former.onnx: a query and the images of one request -> latents, the vision tower run once more."""

import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from exporters.onnx.assembly import single
from exporters.onnx.vision import program_of
from surgeon.families import Family
from surgeon.memory.short_former import ShortFormer


def short_former_graph(
    family: Family, model: PreTrainedModel, former: ShortFormer, num_queries: int, dtype: torch.dtype
) -> ir.Model:
    """The short former of `model`, a module of it; the model is on the meta device and of `dtype`.

    Inputs: `queries [1, K, d]`, and what the family computes of each of a request's images on the host
    (`Family.short_former_inputs`), one after the other. Output: `latents [1, N, d]`.
    """
    export = family.short_former_export(model, former, num_queries, dtype)
    return single("short_former", program_of(export), export.parameters)
