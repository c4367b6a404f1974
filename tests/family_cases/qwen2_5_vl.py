"""Qwen2.5-VL, with windowed attention in its vision tower."""

from typing import Any

from transformers import PretrainedConfig, Qwen2_5_VLConfig

from family_case import FamilyCase
from family_cases import _qwen_vl


def config(text: Any, vision: Any, **others: Any) -> PretrainedConfig:
    # this family's defaults of these ids lie outside the small vocabulary
    text = {"bos_token_id": None, "eos_token_id": None, **text}
    tower = {"patch_size": 14, "fullatt_block_indexes": [1], "window_size": 112, **vision}
    return _qwen_vl.config(Qwen2_5_VLConfig, text, tower, **others)


CASE = FamilyCase(
    config=config,
    processor_class="Qwen2_5_VLProcessor",
    special_tokens=_qwen_vl.SPECIAL_TOKENS,
    preprocessor=_qwen_vl.preprocessor,
    side_multiple=2,
    pixels_of_side=_qwen_vl.pixels_of_side,
)
