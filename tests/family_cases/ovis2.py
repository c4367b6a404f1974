"""Ovis2, whose visual tokens are mixtures of visual words, with indicator tokens around an image and its parts."""

from functools import partial
from typing import Any

from transformers import Ovis2Config, PretrainedConfig

from family_case import TOKEN_IDS, FamilyCase
from family_cases import _plain

INDICATORS = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]


def config(
    text: Any,
    vision: Any,
    token_ids: Any,
    tie_word_embeddings: bool,
    text_type: str = "qwen2",
    top: dict[str, Any] | None = None,
) -> PretrainedConfig:
    text = _plain.text_config({**text, "tie_word_embeddings": tie_word_embeddings}, text_type)
    first = TOKEN_IDS["vision_end_token_id"] + 1
    return Ovis2Config(
        text_config=text,
        vision_config=_plain.vision_config(vision, hidden_stride=2, vocab_size=64, qkv_bias=True),
        vocab_size=text["vocab_size"],
        hidden_size=text["hidden_size"],
        tie_word_embeddings=tie_word_embeddings,
        **{
            "image_token_id": TOKEN_IDS["image_token_id"],
            "visual_indicator_token_ids": list(range(first, first + len(INDICATORS))),
            **token_ids,
            **(top or {}),
        },
    )


CASE = FamilyCase(
    config=config,
    processor_class="Ovis2Processor",
    special_tokens={"image_token_id": "<IMG_ATOM>", "visual_indicator_token_ids": INDICATORS},
    preprocessor=partial(
        _plain.preprocessor,
        crop_to_patches=True,
        image_processor_type="Ovis2ImageProcessor",
        min_patches=1,
        max_patches=6,
    ),
    processor=lambda config: {"image_seq_length": 9},
    added_tokens=("<IMG_ATOM>", *INDICATORS),
    chat_template=_plain.TEMPLATE.replace("PLACEHOLDER", "<image>"),
    side_multiple=2,
    vision_of_side=_plain.vision_of_side,
    prompt_passes=("rope-dhr",),
)
