"""What the Qwen-VL families share."""

import json
from typing import Any

import numpy as np
from family_case import TEXT, TOWER
from transformers import PretrainedConfig

from checkpoints import DEMO
from surgeon.families import Grid

SPECIAL_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


def text_config(text: dict[str, Any], **rope: Any) -> dict[str, Any]:
    """`text` over the tiny one, with frequencies in three sections of its head size."""
    merged = {**TEXT, **text}
    half = (merged.get("head_dim") or merged["hidden_size"] // merged["num_attention_heads"]) // 2
    side = half * 5 // 16
    sections = [half - 2 * side, side, side]
    merged.setdefault("rope_parameters", {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections, **rope})
    return merged


def vision_config(text: dict[str, Any], **tower: Any) -> dict[str, Any]:
    return {**TOWER, "depth": 3, "num_heads": 2, "out_hidden_size": text["hidden_size"], **tower}


def preprocessor(config: PretrainedConfig) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((DEMO / "preprocessor_config.json").read_text())
    return {**settings, "patch_size": config.vision_config.patch_size}


def pixels_of_side(config: PretrainedConfig, side: int) -> tuple[np.ndarray, Grid]:
    vision = config.vision_config
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = np.random.default_rng(side).standard_normal((side * side, width), dtype=np.float32)
    return pixels, (1, side, side)
