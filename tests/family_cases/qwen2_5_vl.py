"""Qwen2.5-VL, with windowed attention in its vision tower."""

from typing import Any

from family_case import TOKEN_IDS, FamilyCase
from family_cases import _qwen_vl
from transformers import PretrainedConfig, Qwen2_5_VLConfig


def config(text: Any, vision: Any, token_ids: Any, tie_word_embeddings: bool, **others: Any) -> PretrainedConfig:
    # this family's defaults of these ids lie outside the small vocabulary
    text = _qwen_vl.text_config({"bos_token_id": None, "eos_token_id": None, **text})
    tower = {"patch_size": 14, "fullatt_block_indexes": [1], "window_size": 112, **vision}
    return Qwen2_5_VLConfig(
        text_config={**text, "tie_word_embeddings": tie_word_embeddings},
        vision_config=_qwen_vl.vision_config(text, **tower),
        tie_word_embeddings=tie_word_embeddings,
        **{**TOKEN_IDS, **token_ids},
        **others,
    )


CASE = FamilyCase(
    config=config,
    processor_class="Qwen2_5_VLProcessor",
    special_tokens=_qwen_vl.SPECIAL_TOKENS,
    preprocessor=_qwen_vl.preprocessor,
    side_multiple=2,
    pixels_of_side=_qwen_vl.pixels_of_side,
)
