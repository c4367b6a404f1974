"""What vision towers written out for export share: attention over images side by side, and the export's making."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from surgeon import ops
from surgeon.families._base import VisionExport


def image_attention(q: Tensor, k: Tensor, v: Tensor, length: int | None, num_heads: int, scale: float) -> Tensor:
    """Attention within each image of `length` patches, heads packed: q, k, v [T * length, d] -> [T * length, d]. With
    None all rows are one sequence."""
    width = q.shape[1]
    q, k, v = (t.reshape(-1, length, width) if length is not None else t[None] for t in (q, k, v))
    return ops.attention_packed(q, k, v, None, num_heads, scale).reshape(-1, width)


def finish_export(
    model: PreTrainedModel,
    module: nn.Module,
    example: Mapping[str, Tensor],
    dynamic: Mapping[str, Any],
    output_names: Sequence[str],
    constants: Mapping[str, Tensor] | None = None,
    reshaped: Mapping[str, str] | None = None,
) -> VisionExport:
    """`module`, made of submodules and parameters of `model`, as a VisionExport. `dynamic` names the first size of each
    input where it varies. `constants`: the values, on the CPU, of the buffers that no checkpoint holds, by name.
    `reshaped`: parameters of the module that are the model's in another shape, and their names there."""
    names = {id(p): name for name, p in model.named_parameters()}
    names |= {id(module.get_parameter(own)): name for own, name in (reshaped or {}).items()}
    parameters = dict(module.named_parameters())
    device = next(iter(parameters.values())).device
    return VisionExport(
        module=module,
        example={name: tensor.to(device) for name, tensor in example.items()},
        dynamic_shapes={name: {0: dynamic[name]} if name in dynamic else None for name in example},
        output_names=tuple(output_names),
        constants=dict(constants or {}),
        parameters={name: names[id(p)] for name, p in parameters.items()},
    )


def tiles_export(
    model: PreTrainedModel,
    module: nn.Module,
    size: tuple[int, int],
    dtype: torch.dtype,
    output_names: Sequence[str] = ("features",),
    **others: Tensor,
) -> VisionExport:
    """`finish_export` of a module that takes `pixel_values [T, 3, H, W]`, (H, W) being `size`. `others`: examples of
    what it takes before them, of sizes that do not vary."""
    example = {**others, "pixel_values": torch.zeros(3, 3, *size, dtype=dtype)}
    return finish_export(model, module, example, {"pixel_values": torch.export.Dim("T")}, output_names)
