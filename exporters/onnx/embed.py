"""embed.onnx: token ids -> embeddings."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from exporters.onnx.trace import Program, parameter_names


class Embed(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 [B, S] -> [B, S, d]."""
        return F.embedding(input_ids, self.weight)


def embed_program(model: PreTrainedModel) -> Program:
    """The embedding table of `model`, which is on the meta device."""
    module = Embed(model.get_input_embeddings().weight)
    return Program(
        module=module,
        example={"input_ids": torch.empty(2, 3, dtype=torch.int64, device="meta")},
        dynamic_shapes={"input_ids": {0: torch.export.Dim("B"), 1: torch.export.Dim("S")}},
        input_names=["input_ids"],
        output_names=["inputs_embeds"],
        constants={},
        parameters=parameter_names(module, model),
    )
