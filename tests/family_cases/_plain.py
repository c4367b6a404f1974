"""What families share whose decoder is a plain language model: tiles of 42 x 42 pixels, each 6 x 6 patches."""

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from family_case import TEXT, TOWER

# every part of a message as the published template of such families writes it
TEMPLATE = """{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\n' }}
{%- if message['content'] is string %}{{ message['content'] }}{% else %}
{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}{{ 'PLACEHOLDER\n' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}
{%- endfor %}{% endif %}{{ '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def text_config(text: Mapping[str, Any], text_type: str) -> dict[str, Any]:
    merged = {
        **TEXT,
        "model_type": text_type,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        **text,
    }
    if merged["head_dim"] is None:  # older configs do not say
        del merged["head_dim"]
    return merged


def vision_config(vision: Mapping[str, Any], **own: Any) -> dict[str, Any]:
    tower = {"num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 42, "patch_size": 7}
    return {**TOWER, **tower, **own, **vision}


def vision_of_side(side: int) -> dict[str, Any]:
    return {"image_size": 7 * side}


def preprocessor(config: PretrainedConfig, **own: Any) -> dict[str, Any]:
    """An image processor that cuts tiles of the vision tower's size, six at most."""
    size = config.vision_config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return {
        "size": {"height": height, "width": width},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        **own,
    }
