"""InternVL in transformers' own layout, over any of its text models."""

from functools import partial
from typing import Any

from transformers import InternVLConfig, PretrainedConfig

from family_case import TOKEN_IDS, FamilyCase
from family_cases import _plain


def config(
    text: Any,
    vision: Any,
    token_ids: Any,
    tie_word_embeddings: bool,
    text_type: str = "qwen2",
    top: dict[str, Any] | None = None,
) -> PretrainedConfig:
    return InternVLConfig(
        text_config=_plain.text_config({**text, "tie_word_embeddings": tie_word_embeddings}, text_type),
        vision_config=_plain.vision_config(vision, attention_bias=True),
        image_seq_length=9,
        tie_word_embeddings=tie_word_embeddings,
        image_token_id=token_ids.get("image_token_id", TOKEN_IDS["image_token_id"]),
        **(top or {}),
    )


CASE = FamilyCase(
    config=config,
    processor_class="InternVLProcessor",
    special_tokens={"image_token_id": "<IMG_CONTEXT>"},
    # as published: InternVL's processor says otherwise when it calls the image processor
    preprocessor=partial(
        _plain.preprocessor,
        crop_to_patches=False,
        image_processor_type="GotOcr2ImageProcessor",
        min_patches=1,
        max_patches=6,
    ),
    processor=lambda config: {"image_seq_length": 9},
    named_tokens={
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    chat_template=_plain.TEMPLATE.replace("PLACEHOLDER", "<IMG_CONTEXT>"),
    side_multiple=2,
    vision_of_side=_plain.vision_of_side,
    prompt_passes=("rope-dhr",),
)
