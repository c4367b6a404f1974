"""memory.onnx: visual embeddings -> keys and values of every graft, computed once when pictures enter."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from exporters.onnx.trace import Program, parameter_names
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
    entries = []
    for index, layer in enumerate(decoder.layers):
        for graft in _grafts(layer):
            probe = torch.empty((1, 1, decoder.config.hidden_size), dtype=decoder.norm.weight.dtype, device="meta")
            keys, _ = graft.project(probe)
            entries.append(MemoryEntry(index, graft.kind, keys.shape[1], keys.shape[3]))
    return entries


class Memory(nn.Module):
    """`project` of every graft."""

    def __init__(self, grafts: Sequence[Graft]) -> None:
        super().__init__()
        self.grafts = nn.ModuleList(grafts)

    def forward(self, visual_embeds: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [graft.project(visual_embeds) for graft in self.grafts]  # type: ignore[operator]


class _ExportRMSNorm(RMSNorm):
    """RMSNorm as one operator."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


def memory_program(family: Family, config: PretrainedConfig, model: PreTrainedModel, dtype: torch.dtype) -> Program:
    """The memory graph of a patched `model`, which is on the meta device, of `dtype`, and only good for export after."""
    decoder = model.get_submodule(family.text_model)
    module = Memory([graft for layer in decoder.layers for graft in _grafts(layer)])  # type: ignore[union-attr]
    for child in module.modules():
        if type(child) is RMSNorm:
            child.__class__ = _ExportRMSNorm
    example = torch.empty(2, 5, family.text_config(config).hidden_size, dtype=dtype, device="meta")
    return Program(
        module=module,
        example={"visual_embeds": example},
        dynamic_shapes={"visual_embeds": {0: torch.export.Dim("B"), 1: torch.export.Dim("M")}},
        input_names=["visual_embeds"],
        output_names=[f"memory_{part}.{e.name}" for e in memory_entries(decoder) for part in ("keys", "values")],
        constants={},
        parameters=parameter_names(module, model),
    )


def _grafts(layer: nn.Module) -> list[Graft]:
    return [child for child in layer.children() if isinstance(child, Graft)]
