"""Qwen3-VL: learned and rotary positions, full attention. DeepStack's mergers take no part."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from surgeon.memory.towers._base import ImageInputs
from surgeon.memory.towers._qwen_vl import QwenTower, joined, rotary


class Qwen3VLTower(QwenTower):
    @classmethod
    def encode(
        cls, base_model: Any, blocks: Sequence[nn.Module], images: Sequence[ImageInputs], behind: Tensor
    ) -> Tensor:
        visual = base_model.visual
        pixel_values, grids = joined(images)
        patches = visual.patch_embed(pixel_values)
        index, weight = get_vision_interpolation_indices_and_weights(
            grids,
            num_grid_per_side=visual.num_grid_per_side,
            mode=visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners,
            spatial_merge_size=visual.spatial_merge_size,
        )
        patches = patches + (visual.pos_embed(index) * weight[:, :, None]).sum(1).to(patches.dtype)
        x = torch.cat((patches, behind.to(patches)))
        turns = rotary(visual, get_vision_position_ids(grids, visual.spatial_merge_size), len(behind))
        bounds = torch.tensor([0, len(x)], dtype=torch.int32, device=x.device)
        for block in blocks:
            x = block(x, cu_seqlens=bounds, position_embeddings=turns)
        return x[len(patches) :]


TOWER = Qwen3VLTower
