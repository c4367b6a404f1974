"""Qwen3-VL, with DeepStack and interleaved position axes."""

from typing import Any

from transformers import PretrainedConfig, Qwen3VLConfig

from family_case import FamilyCase
from family_cases import _qwen_vl


def config(text: Any, vision: Any, **others: Any) -> PretrainedConfig:
    text = {"head_dim": 16, **text}
    tower = {"patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1], **vision}
    return _qwen_vl.config(Qwen3VLConfig, text, tower, rope={"mrope_interleaved": True}, **others)


CASE = FamilyCase(
    config=config,
    processor_class="Qwen3VLProcessor",
    special_tokens=_qwen_vl.SPECIAL_TOKENS,
    preprocessor=_qwen_vl.preprocessor,
    side_multiple=2,
    pixels_of_side=_qwen_vl.pixels_of_side,
)
