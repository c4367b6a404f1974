"""What the Qwen-VL towers share: patches of images of any size in one sequence, and rotary positions."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from surgeon.memory.towers._base import ImageInputs, Tower
from surgeon.memory.towers._rows import by_row, refuse_videos


class QwenTower(Tower):
    """An image is its patches, [N, C], and its grid, int64 [1, 3]."""

    blocks = "visual.blocks"
    targets = ("attn.qkv", "attn.proj")

    @staticmethod
    def width(config: Any) -> int:
        return int(config.vision_config.hidden_size)

    @staticmethod
    def depth(config: Any) -> int:
        return int(config.vision_config.depth)

    @staticmethod
    def slots_per_vector(config: Any) -> int:
        return int(config.vision_config.spatial_merge_size**2)

    @classmethod
    def images_by_row(
        cls, base_model: Any, kwargs: Mapping[str, Any], visual_token_mask: Tensor
    ) -> list[list[ImageInputs]]:
        """Raises ValueError where a row's visual tokens are not those of whole images, or for videos."""
        refuse_videos(kwargs)
        grids = kwargs["image_grid_thw"]
        patches = grids.prod(-1).tolist()
        images = [
            {"pixel_values": pixel_values, "image_grid_thw": grid}
            for pixel_values, grid in zip(kwargs["pixel_values"].split(patches), grids.split(1), strict=True)
        ]
        merged = cls.slots_per_vector(base_model.config)
        return by_row(images, [count // merged for count in patches], visual_token_mask)

    @classmethod
    def project(cls, base_model: Any, slots: Tensor) -> Tensor:
        features: Tensor = base_model.visual.merger(slots)
        return features


def joined(images: Sequence[ImageInputs]) -> tuple[Tensor, Tensor]:
    """The patches of all images, [N, C], and their grids, int64 [images, 3]."""
    return torch.cat([image["pixel_values"] for image in images]), torch.cat(
        [image["image_grid_thw"] for image in images]
    )


def rotary(visual: Any, position_ids: Tensor, behind: int) -> tuple[Tensor, Tensor]:
    """cos and sin fp32 [N + behind, head_dim] as the tower's blocks take them. position_ids int64 [N, 2], of the
    patches; what stands behind them is not turned."""
    angles = (position_ids[..., None].float() * visual.rotary_pos_emb.inv_freq.float()).flatten(1)
    angles = torch.cat((angles, angles.new_zeros(behind, angles.shape[1])))
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()
