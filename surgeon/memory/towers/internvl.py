"""InternVL: a ViT with a class token, whose patches are merged by pixel shuffle."""

from typing import Any

from torch import Tensor

from surgeon.memory.towers._thumbnails import TiledTower, depth_of_feature_layer


class InternVLTower(TiledTower):
    """An image's patches have their class token in front of them. Slots that become one vector stand in it as the
    patches of a block do, row by row."""

    blocks = "vision_tower.encoder.layer"
    targets = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.projection_layer")
    thumbnail = "last"
    separated_tiles = False

    @staticmethod
    def width(config: Any) -> int:
        """Raises ValueError for features of several layers."""
        depth_of_feature_layer(config)
        return int(config.vision_config.hidden_size)

    @staticmethod
    def slots_per_vector(config: Any) -> int:
        return int(1 / config.downsample_ratio) ** 2

    @staticmethod
    def depth(config: Any) -> int:
        return depth_of_feature_layer(config)

    @staticmethod
    def tokens_per_tile(config: Any) -> int:
        vision = config.vision_config
        rows, columns = (
            int(size // patch * config.downsample_ratio)
            for size, patch in zip(vision.image_size, vision.patch_size, strict=True)
        )
        return rows * columns

    @classmethod
    def embed(cls, base_model: Any, pixel_values: Tensor) -> Tensor:
        embedded: Tensor = base_model.vision_tower.embeddings(pixel_values)
        return embedded

    @classmethod
    def project(cls, base_model: Any, slots: Tensor) -> Tensor:
        config = base_model.config
        if config.vision_feature_layer == -1:  # any other is taken before the last norm
            slots = base_model.vision_tower.layernorm(slots)
        merged = slots.reshape(-1, cls.slots_per_vector(config) * slots.shape[-1])
        features: Tensor = base_model.multi_modal_projector(merged)
        return features


TOWER = InternVLTower
