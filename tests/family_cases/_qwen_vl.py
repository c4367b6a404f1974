"""What the Qwen-VL families share."""

import json
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from checkpoints import DEMO
from family_case import TEXT, TOKEN_IDS, TOWER
from surgeon.families import Grid

SPECIAL_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


def config(
    config_class: type[PretrainedConfig],
    text: dict[str, Any],
    vision: dict[str, Any],
    token_ids: dict[str, Any],
    tie_word_embeddings: bool,
    rope: dict[str, Any] | None = None,
    **others: Any,
) -> PretrainedConfig:
    """A tiny config of `text` and `vision`, with frequencies in three sections of the head size. `rope`: what else the
    family's rope parameters say."""
    text = {**TEXT, **text}
    half = (text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]) // 2
    side = half * 5 // 16
    frequencies = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [half - 2 * side, side, side]}
    text.setdefault("rope_parameters", {**frequencies, **(rope or {})})
    return config_class(
        text_config={**text, "tie_word_embeddings": tie_word_embeddings},
        vision_config={**TOWER, "depth": 3, "num_heads": 2, "out_hidden_size": text["hidden_size"], **vision},
        tie_word_embeddings=tie_word_embeddings,
        **{**TOKEN_IDS, **token_ids},
        **others,
    )


def preprocessor(config: PretrainedConfig) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((DEMO / "preprocessor_config.json").read_text())
    return {**settings, "patch_size": config.vision_config.patch_size}


def pixels_of_side(config: PretrainedConfig, side: int) -> tuple[np.ndarray, Grid]:
    vision = config.vision_config
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = np.random.default_rng(side).standard_normal((side * side, width), dtype=np.float32)
    return pixels, (1, side, side)
