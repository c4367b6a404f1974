"""Qwen3-VL, with DeepStack and interleaved position axes."""

from typing import Any

from family_case import TOKEN_IDS, FamilyCase
from family_cases import _qwen_vl
from transformers import PretrainedConfig, Qwen3VLConfig


def config(text: Any, vision: Any, token_ids: Any, tie_word_embeddings: bool, **others: Any) -> PretrainedConfig:
    text = _qwen_vl.text_config({"head_dim": 16, **text}, mrope_interleaved=True)
    tower = {"patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1], **vision}
    return Qwen3VLConfig(
        text_config={**text, "tie_word_embeddings": tie_word_embeddings},
        vision_config=_qwen_vl.vision_config(text, **tower),
        tie_word_embeddings=tie_word_embeddings,
        **{**TOKEN_IDS, **token_ids},
        **others,
    )


CASE = FamilyCase(
    config=config,
    processor_class="Qwen3VLProcessor",
    special_tokens=_qwen_vl.SPECIAL_TOKENS,
    preprocessor=_qwen_vl.preprocessor,
    side_multiple=2,
    pixels_of_side=_qwen_vl.pixels_of_side,
)
