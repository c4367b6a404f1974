"""LLaVA-OneVision: SigLIP, each of whose patches becomes a visual embedding."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

from surgeon.memory.towers._base import ImageInputs
from surgeon.memory.towers._rows import by_row, refuse_videos
from surgeon.memory.towers._thumbnails import ThumbnailTower, depth_of_feature_layer


class LlavaOnevisionTower(ThumbnailTower):
    """An image's first crop is the whole."""

    blocks = "vision_tower.encoder.layers"
    targets = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
    block_arguments = (None,)

    @staticmethod
    def width(config: Any) -> int:
        """Raises ValueError for a vision tower other than SigLIP, or for features of several of its layers."""
        if config.vision_config.model_type != "siglip_vision_model":
            raise ValueError(f"vision tower {config.vision_config.model_type}: short memory takes siglip_vision_model")
        depth_of_feature_layer(config)
        return int(config.vision_config.hidden_size)

    @staticmethod
    def slots_per_vector(config: Any) -> int:
        return 1

    @staticmethod
    def depth(config: Any) -> int:
        return depth_of_feature_layer(config)

    @classmethod
    def images_by_row(
        cls, base_model: Any, kwargs: Mapping[str, Any], visual_token_mask: Tensor
    ) -> list[list[ImageInputs]]:
        """`image_sizes` and `batch_num_images` say how many crops and visual tokens an image has, as in the model.

        Raises ValueError where a row's visual tokens are not those of whole images, or for videos.
        """
        refuse_videos(kwargs)
        config, pixel_values, sizes = base_model.config, kwargs["pixel_values"], kwargs["image_sizes"]
        images_of_rows = kwargs.get("batch_num_images")
        counts = [1] * len(sizes) if images_of_rows is None else torch.as_tensor(images_of_rows).tolist()
        in_tiles = [count == 1 for count in counts for _ in range(count)]
        crops = [
            image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size) if cut else 1
            for size, cut in zip(sizes, in_tiles, strict=True)
        ]
        per_image = pixel_values.split(crops) if pixel_values.ndim == 4 else pixel_values
        images = [{"pixel_values": own[:1]} for own in per_image]
        # the model's own arithmetic, over features without values
        side = config.vision_config.image_size // config.vision_config.patch_size
        patches = side**2 - (config.vision_feature_select_strategy == "default")
        packed, _ = base_model.pack_image_features(
            [torch.empty(count, patches, 1, device="meta") for count in crops],
            sizes,
            image_newline=torch.empty(1, device="meta"),
            vision_aspect_ratio=config.vision_aspect_ratio,
        )
        return by_row(images, [len(features) for features in packed], visual_token_mask)

    @classmethod
    def embed(cls, base_model: Any, pixel_values: Tensor) -> Tensor:
        embedded: Tensor = base_model.vision_tower.embeddings(pixel_values)
        return embedded

    @classmethod
    def project(cls, base_model: Any, slots: Tensor) -> Tensor:
        features: Tensor = base_model.multi_modal_projector(slots)
        return features


TOWER = LlavaOnevisionTower
