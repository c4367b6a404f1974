"""Qwen2.5-VL: rotary positions, attention within windows in most blocks and over everything in some."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from surgeon.memory.towers._base import ImageInputs
from surgeon.memory.towers._qwen_vl import QwenTower, joined, rotary


class Qwen25VLTower(QwenTower):
    """What stands behind the patches is a window of its own; in the blocks of full attention it sees the patches, and
    they see it."""

    @classmethod
    def encode(
        cls, base_model: Any, blocks: Sequence[nn.Module], images: Sequence[ImageInputs], behind: Tensor
    ) -> Tensor:
        visual = base_model.visual
        pixel_values, grids = joined(images)
        order, bounds_of_windows = get_vision_window_index(
            grids,
            spatial_merge_size=visual.spatial_merge_size,
            window_size=visual.window_size,
            patch_size=visual.patch_size,
        )

        def in_window_order(values: Tensor) -> Tensor:
            """Of patches [N, c], by blocks of those that are merged."""
            return values.unflatten(0, (-1, visual.spatial_merge_unit))[order].flatten(0, 1)

        patches = in_window_order(visual.patch_embed(pixel_values))
        x = torch.cat((patches, behind.to(patches)))
        position_ids = in_window_order(get_vision_position_ids(grids, visual.spatial_merge_size))
        turns = rotary(visual, position_ids, len(behind))
        within_windows = F.pad(bounds_of_windows, (0, 1), value=len(x))
        everything = torch.tensor([0, len(x)], dtype=torch.int32, device=x.device)
        for index, block in enumerate(blocks):
            bounds = everything if index in visual.fullatt_block_indexes else within_windows
            x = block(x, cu_seqlens=bounds, position_embeddings=turns)
        return x[len(patches) :]


TOWER = Qwen25VLTower
