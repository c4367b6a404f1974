"""A short former written out for export: a family's vision tower with its adapters, over vectors behind the patches."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from surgeon.memory.lora import Adapters, adapted
from surgeon.memory.short_former import ShortFormer


class ShortFormerVision(nn.Module):
    """Over a vision tower written out for export, `vision`, whose `project_slots` does what `Tower.project` does."""

    def __init__(self, vision: Any, former: ShortFormer) -> None:
        super().__init__()
        self.vision = vision
        self.query_map, self.memory_init = former.query_map, former.memory_init

    def behind(self, queries: Tensor) -> Tensor:
        """What stands behind the patches, [n, d_v]. queries [1, K, d]."""
        return torch.cat((self.query_map(queries[0]), self.memory_init))

    def latents(self, x: Tensor) -> tuple[Tensor]:
        """The latents [1, N, d] of what comes out of the last block, [S, d_v]."""
        features: Tensor = self.vision.project_slots(x[-len(self.memory_init) :])
        return (features[None],)


class ThumbnailShortFormer(ShortFormerVision):
    """Of a family whose tower sees tiles of one size: `vision` has `embed` and `run_blocks`."""

    def forward(self, queries: Tensor, pixel_values: Tensor) -> tuple[Tensor]:
        """queries [1, K, d], pixel_values [T, 3, H, W], a thumbnail of each image -> latents [1, N, d]."""
        patches = self.vision.embed(pixel_values)
        x = torch.cat((patches.reshape(-1, patches.shape[-1]), self.behind(queries)))
        return self.latents(self.vision.run_blocks(x, None))


def with_adapters(model: PreTrainedModel, former: ShortFormer, dtype: torch.dtype) -> Any:
    """A view of `model` in which the former's adapters act, at the names of the model's own modules.

    Raises ValueError where the former is not of the dtype the graph is to have.
    """
    if former.memory_init.dtype != dtype:
        raise ValueError(f"the short former is of {former.memory_init.dtype}, the graph is to be {dtype}")
    tree: nn.Module = former.adapters
    for name in reversed(f"{model.base_model_prefix}.{former.tower.blocks}".split(".")):
        parent = Adapters()
        parent.add_module(name, tree)
        tree = parent
    return adapted(model, tree)


def example_queries(former: ShortFormer, num_queries: int) -> Tensor:
    """[1, K, d], without values."""
    width = former.query_map.in_features
    return torch.zeros(1, num_queries, width, dtype=former.memory_init.dtype, device=former.memory_init.device)


def concatenated(inputs: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The graph inputs of several images, one after the other."""
    return {name: np.concatenate([own[name] for own in inputs]) for name in inputs[0]}
