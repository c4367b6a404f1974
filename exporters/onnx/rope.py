"""Rotary angles of the grafts' own queries and keys, in exported graphs."""

from collections.abc import Iterable
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from surgeon.families import Family
from surgeon.memory.graft import Graft
from surgeon.memory.rotary import Rope, Rotary


class GraftRopes(nn.Module):
    """cos and sin for each kind of graft with a rope, which its layers share."""

    def __init__(self, ropes: dict[str, Rope]) -> None:
        super().__init__()
        self.ropes = ropes
        for name, value in self.constants().items():
            self.register_buffer(name, value.to("meta"), persistent=False)

    @classmethod
    def of(cls, grafts: Iterable[Graft]) -> Self:
        return cls({graft.kind: graft.rope for graft in grafts if graft.rope is not None})

    @property
    def kinds(self) -> list[str]:
        return list(self.ropes)

    def constants(self, prefix: str = "") -> dict[str, Tensor]:
        """The values of the buffers, on the CPU, by their names in a module that has this one under `prefix`."""
        buffers = {}
        for kind, rope in self.ropes.items():
            buffers[f"{prefix}inv_freq_{kind}"] = rope.inv_freq(torch.device("cpu"))
            buffers[f"{prefix}rope_axes_{kind}"] = torch.tensor(rope.axes, dtype=torch.int64)
        return buffers

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> dict[str, Rotary]:
        """position_ids [A, B, S] -> by kind cos, sin [B, S, hd / 2] of `dtype`; angles in fp32."""
        rotaries = {}
        for kind in self.ropes:
            cos, sin = rotary(position_ids, self.get_buffer(f"inv_freq_{kind}"), self.get_buffer(f"rope_axes_{kind}"))
            rotaries[kind] = (cos.to(dtype), sin.to(dtype))
        return rotaries


def rotary(position_ids: Tensor, inv_freq: Tensor, rope_axes: Tensor) -> Rotary:
    """cos and sin fp32 [B, S, hd / 2] of position_ids [A, B, S]: each frequency turns with its axis of them."""
    angles = position_ids.float().index_select(0, rope_axes).permute(1, 2, 0) * inv_freq
    return angles.cos(), angles.sin()


def layer_grafts(layer: nn.Module) -> list[Graft]:
    """A decoder layer's grafts, in the order in which they were grafted."""
    return [child for child in layer.children() if isinstance(child, Graft)]


def num_position_axes(family: Family, config: PretrainedConfig) -> int:
    """How many axes the family's position ids have."""
    one = np.ones((1, 1), dtype=np.int64)
    return int(family.position_ids(config, one, one, [[]])[0].shape[0])
