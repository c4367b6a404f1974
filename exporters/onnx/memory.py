"""memory.onnx: visual embeddings -> keys and values of every graft, computed once when images enter."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from exporters.onnx import functions
from exporters.onnx.assembly import single
from exporters.onnx.rope import GraftRopes, layer_grafts, num_position_axes
from exporters.onnx.trace import Program, parameter_names, placeholder
from surgeon import ops
from surgeon.families import Family
from surgeon.memory.graft import Graft
from surgeon.memory.rms_norm import RMSNorm


@dataclass(frozen=True)
class MemoryEntry:
    """One graft's place in the visual memory."""

    layer: int
    kind: str
    num_key_value_heads: int
    head_dim: int

    @property
    def name(self) -> str:
        """The entry's name in the visual memory and in the graphs' inputs and outputs."""
        return f"{self.layer}.{self.kind}"


def memory_entries(decoder: Any) -> list[MemoryEntry]:
    """The grafts of a decoder on the meta device, by layer, in the order in which they were grafted."""
    width, dtype = decoder.config.hidden_size, decoder.norm.weight.dtype
    return [
        MemoryEntry(index, kind, *heads)
        for index, layer in enumerate(decoder.layers)
        for kind, heads in layer_entries(layer, width, dtype).items()
    ]


def layer_entries(layer: nn.Module, width: int, dtype: torch.dtype) -> dict[str, tuple[int, int]]:
    """Kind of graft -> number and size of the heads of its keys, for a layer on the meta device."""
    probe = torch.empty((1, 1, width), dtype=dtype, device="meta")
    heads = {}
    for graft in layer_grafts(layer):
        rotary = None
        if graft.rope is not None:
            rotary = graft.rope(torch.zeros((max(graft.rope.axes) + 1, 1, 1), dtype=torch.int64, device="meta"))
        shape = graft.project(probe, rotary)[0].shape
        heads[graft.kind] = (shape[1], shape[3])
    return heads


class MemoryProjection(nn.Module):
    """`project` of every graft."""

    def __init__(self, grafts: Sequence[Graft], ropes: GraftRopes) -> None:
        super().__init__()
        self.grafts, self.ropes = nn.ModuleList(grafts), ropes

    def forward(self, visual_embeds: Tensor, media_position_ids: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        """visual_embeds [B, M, d]; media_position_ids [A, B, M], where some graft has a rope."""
        rotary = {} if media_position_ids is None else self.ropes(media_position_ids, visual_embeds.dtype)
        return [functions.project(graft, visual_embeds, rotary.get(graft.kind)) for graft in self.grafts]  # type: ignore[arg-type]


class _ExportRMSNorm(RMSNorm):
    """RMSNorm as one operator."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


def memory_graph(family: Family, config: PretrainedConfig, model: PreTrainedModel, dtype: torch.dtype) -> ir.Model:
    """The graph of a patched `model`, which is on the meta device, of `dtype`, and good for export alone after."""
    decoder = model.get_submodule(family.text_model)
    grafts = [graft for layer in decoder.layers for graft in layer_grafts(layer)]
    ropes = GraftRopes.of(grafts)
    module = MemoryProjection(grafts, ropes)
    for child in module.modules():
        if type(child) is RMSNorm:
            child.__class__ = _ExportRMSNorm
    inputs = {"visual_embeds": placeholder("B", "M", family.text_config(config).hidden_size, dtype=dtype)}
    if ropes.kinds:
        inputs["media_position_ids"] = placeholder(num_position_axes(family, config), "B", "M", dtype=torch.int64)
    outputs = [f"memory_{part}.{e.name}" for e in memory_entries(decoder) for part in ("keys", "values")]
    program = Program.of(module, inputs, outputs, constants=ropes.constants("ropes."))
    return single("memory", program, parameter_names(module, model))
