"""LLaVA-OneVision: an image whole and, where it is alone, in tiles whose features are put together (6 x 6 each)."""

from typing import Any

import numpy as np
from transformers import LlavaOnevisionConfig, PretrainedConfig

from family_case import TOKEN_IDS, FamilyCase
from family_cases import _plain
from surgeon.families import Grid


def config(
    text: Any,
    vision: Any,
    token_ids: Any,
    tie_word_embeddings: bool,
    text_type: str = "qwen2",
    top: dict[str, Any] | None = None,
) -> PretrainedConfig:
    return LlavaOnevisionConfig(
        text_config=_plain.text_config({**text, "tie_word_embeddings": tie_word_embeddings}, text_type),
        vision_config=_plain.vision_config(vision, model_type="siglip_vision_model", vision_use_head=False),
        tie_word_embeddings=tie_word_embeddings,
        image_token_index=token_ids.get("image_token_index", TOKEN_IDS["image_token_id"]),
        video_token_index=token_ids.get("video_token_index", TOKEN_IDS["video_token_id"]),
        **{
            "image_grid_pinpoints": [[42 * i, 42 * j] for i in (1, 2, 3) for j in (1, 2, 3)],
            "vision_aspect_ratio": "anyres_max_4",
            **(top or {}),
        },
    )


def preprocessor(config: PretrainedConfig) -> dict[str, Any]:
    return _plain.preprocessor(
        config,
        image_processor_type="LlavaOnevisionImageProcessor",
        image_grid_pinpoints=config.image_grid_pinpoints,
    )


def processor(config: PretrainedConfig) -> dict[str, Any]:
    return {
        "num_image_tokens": 36,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": config.vision_aspect_ratio,
    }


def pixels_of_side(config: PretrainedConfig, side: int) -> tuple[np.ndarray, Grid]:
    """One of several images: the whole alone."""
    size = config.vision_config.image_size
    return np.random.default_rng(side).standard_normal((1, 3, size, size), dtype=np.float32), (1, size, size)


CASE = FamilyCase(
    config=config,
    processor_class="LlavaOnevisionProcessor",
    special_tokens={"image_token_index": "<image>", "video_token_index": "<video>"},
    preprocessor=preprocessor,
    processor=processor,
    added_tokens=("<image>", "<video>"),
    chat_template=_plain.TEMPLATE.replace("PLACEHOLDER", "<image>"),
    vision_of_side=_plain.vision_of_side,
    pixels_of_side=pixels_of_side,
)
