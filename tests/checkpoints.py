"""Small random models and checkpoints of the supported families, for tests. Nothing in them is trivially 0 or 1."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo" / "qwen3-vl-tiny"
MODEL_TYPES = ("qwen3_vl", "qwen2_5_vl")
TILED_TYPES = ("internvl", "ovis2")
PLAIN_TYPES = (*TILED_TYPES, "llava_onevision")
"""Families whose decoder is a plain language model, of one of `TEXT_TYPES`."""
TEXT_TYPES = ("llama", "qwen2", "qwen3")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
TOKEN_IDS = {"image_token_id": 2000, "video_token_id": 2001, "vision_start_token_id": 2002, "vision_end_token_id": 2003}
SPECIAL_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
OVIS2_INDICATORS = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
TILED_TOKENS: dict[str, Any] = {
    "internvl": {"image_token_id": "<IMG_CONTEXT>"},
    "ovis2": {"image_token_id": "<IMG_ATOM>", "visual_indicator_token_ids": OVIS2_INDICATORS},
    "llava_onevision": {"image_token_index": "<image>", "video_token_index": "<video>"},
}
# every part of a message as the published template of such families writes it
TILED_TEMPLATE = """{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\n' }}
{%- if message['content'] is string %}{{ message['content'] }}{% else %}
{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}{{ 'PLACEHOLDER\n' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}
{%- endfor %}{% endif %}{{ '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def tiny_config(
    model_type: str,
    *,
    tie_word_embeddings: bool = False,
    token_ids: dict[str, int] | None = None,
    vision: dict[str, Any] | None = None,
    **text_overrides: Any,
) -> PretrainedConfig:
    """A family's config, 4 text layers and 3 vision blocks small. `vision` and the keywords override its defaults; for
    families that take several text models, `text_type` says which (default: Qwen2), and `top` overrides what is in
    neither part."""
    if model_type in PLAIN_TYPES:
        return _plain_config(model_type, tie_word_embeddings, token_ids or {}, vision or {}, **text_overrides)
    text: dict[str, Any] = {
        "vocab_size": 2048,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tie_word_embeddings,
    }
    if model_type == "qwen3_vl":
        text["head_dim"] = 16
    else:  # this family's defaults lie outside the small vocabulary
        text |= {"bos_token_id": None, "eos_token_id": None}
    text.update(text_overrides)
    half = (text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]) // 2
    side = half * 5 // 16
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [half - 2 * side, side, side]}
    tower: dict[str, Any] = {
        "depth": 3,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 48,
        "out_hidden_size": text["hidden_size"],
    }
    if model_type == "qwen3_vl":
        rope["mrope_interleaved"] = True
        tower |= {"patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
        config_class = transformers.Qwen3VLConfig
    elif model_type == "qwen2_5_vl":
        tower |= {"patch_size": 14, "fullatt_block_indexes": [1], "window_size": 112}
        config_class = transformers.Qwen2_5_VLConfig
    else:
        raise ValueError(f"no tiny model of type {model_type!r}; there are {MODEL_TYPES}")
    text.setdefault("rope_parameters", rope)
    return config_class(
        text_config=text,
        vision_config=tower | (vision or {}),
        tie_word_embeddings=tie_word_embeddings,
        **(TOKEN_IDS | (token_ids or {})),
    )


def _plain_config(
    model_type: str,
    tie_word_embeddings: bool,
    token_ids: dict[str, int],
    vision: dict[str, Any],
    text_type: str = "qwen2",
    top: dict[str, Any] | None = None,
    **text_overrides: Any,
) -> PretrainedConfig:
    """Tiles of 42 x 42 pixels, each 6 x 6 patches, which become 3 x 3 visual tokens (LLaVA-OneVision: 6 x 6)."""
    text = {
        "model_type": text_type,
        "vocab_size": 2048,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": tie_word_embeddings,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        **text_overrides,
    }
    if text["head_dim"] is None:  # older configs do not say
        del text["head_dim"]
    tower = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": 42,
        "patch_size": 7,
    }
    if model_type == "ovis2":
        tower |= {"hidden_stride": 2, "vocab_size": 64, "qkv_bias": True}
        first = TOKEN_IDS["vision_end_token_id"] + 1
        return transformers.Ovis2Config(
            text_config=text,
            vision_config=tower | vision,
            vocab_size=text["vocab_size"],
            hidden_size=text["hidden_size"],
            tie_word_embeddings=tie_word_embeddings,
            **{
                "image_token_id": TOKEN_IDS["image_token_id"],
                "visual_indicator_token_ids": list(range(first, first + 5)),
                **token_ids,
                **(top or {}),
            },
        )
    if model_type == "llava_onevision":
        return transformers.LlavaOnevisionConfig(
            text_config=text,
            vision_config=tower | {"model_type": "siglip_vision_model", "vision_use_head": False} | vision,
            tie_word_embeddings=tie_word_embeddings,
            image_token_index=token_ids.get("image_token_index", TOKEN_IDS["image_token_id"]),
            video_token_index=token_ids.get("video_token_index", TOKEN_IDS["video_token_id"]),
            **{
                "image_grid_pinpoints": [[42 * i, 42 * j] for i in (1, 2, 3) for j in (1, 2, 3)],
                "vision_aspect_ratio": "anyres_max_4",
                **(top or {}),
            },
        )
    tower["attention_bias"] = True
    return transformers.InternVLConfig(
        text_config=text,
        vision_config=tower | vision,
        image_seq_length=9,
        tie_word_embeddings=tie_word_embeddings,
        image_token_id=token_ids.get("image_token_id", TOKEN_IDS["image_token_id"]),
        **(top or {}),
    )


def tiny_model(
    model_type: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    tie_word_embeddings: bool = False,
    token_ids: dict[str, int] | None = None,
    vision: dict[str, Any] | None = None,
    **text_overrides: Any,
) -> PreTrainedModel:
    """A small random model: no weight, bias or norm is trivial, and logits spread over several units.

    `token_ids` replaces entries of `TOKEN_IDS`; `vision` and the other keywords replace config values.
    """
    config = tiny_config(
        model_type, tie_word_embeddings=tie_word_embeddings, token_ids=token_ids, vision=vision, **text_overrides
    )
    name = {
        "qwen3_vl": "Qwen3VLForConditionalGeneration",
        "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
        "internvl": "InternVLForConditionalGeneration",
        "ovis2": "Ovis2ForConditionalGeneration",
        "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    }
    model = getattr(transformers, name[model_type])._from_config(config, dtype=dtype)
    fill(model, seed)
    return model.eval()


def fill(model: nn.Module, seed: int = 0) -> None:
    """Overwrite every parameter with seeded values that keep activations near one, in the parameter's own dtype."""
    generator = torch.Generator().manual_seed(seed)
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter is head:
                noise = noise * 3 / parameter.shape[1] ** 0.5
            elif name.endswith(("cls_token", "position_embeddings")) or name.endswith("image_newline"):
                pass
            elif "lambda_" in name:
                noise = 1 + noise * 0.2
            elif parameter.ndim == 1:
                noise = noise * 0.2
            else:
                noise = noise * 1.2 / parameter[0].numel() ** 0.5
            parameter.copy_(noise)
        for module in model.modules():
            if "Norm" in type(module).__name__:
                module.weight.add_(1.0)
            elif isinstance(module, nn.Embedding) and module.weight is not head:
                module.weight.mul_(module.weight.shape[1] ** 0.5 / 1.2)
        for name, parameter in model.named_parameters():
            if name.endswith("head_norm.weight"):
                parameter.mul_(4.0)  # a patch of Ovis2's prefers some visual words


def has_tokenizer() -> bool:
    """Whether the demo checkpoint, whose tokenizer tiny checkpoints borrow, is there."""
    return (DEMO / "tokenizer.json").is_file()


def tiny_checkpoint(
    directory: Path,
    model_type: str,
    dtype: torch.dtype = torch.float32,
    sharded: bool = False,
    seed: int = 0,
    **options: Any,
) -> Path:
    """`tiny_model(..., **options)` saved in `directory`, with the demo's tokenizer, template and image processor.

    Where there is no demo checkpoint the directory holds the model alone.
    """
    token_ids = {}
    if has_tokenizer():
        tokenizer = demo_tokenizer(model_type)
        special = TILED_TOKENS.get(model_type, SPECIAL_TOKENS)
        token_ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in special.items()}
        options = {"vocab_size": max(2048, len(tokenizer))} | options
    model = tiny_model(model_type, dtype, seed, token_ids=token_ids, **options)
    if has_tokenizer():
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(directory, max_shard_size="400KB" if sharded else "5GB")
    if has_tokenizer():
        if model_type in PLAIN_TYPES:
            tokenizer.save_pretrained(directory)
            tile_preprocessing(directory, model.config)
        else:
            copy_preprocessing(directory, model_type)
    return Path(directory)


def demo_tokenizer(model_type: str) -> Any:
    """The demo's tokenizer, with the image tokens and chat template of a family that cuts tiles where that is asked."""
    if model_type not in PLAIN_TYPES:
        return AutoTokenizer.from_pretrained(DEMO)
    if model_type == "internvl":
        tokenizer = AutoTokenizer.from_pretrained(DEMO, extra_special_tokens=INTERNVL_TOKENS)
        tokenizer.chat_template = TILED_TEMPLATE.replace("PLACEHOLDER", "<IMG_CONTEXT>")
    else:
        tokenizer = AutoTokenizer.from_pretrained(DEMO)
        added = ["<image>", "<video>"] if model_type == "llava_onevision" else ["<IMG_ATOM>", *OVIS2_INDICATORS]
        tokenizer.add_tokens(added, special_tokens=True)
        tokenizer.chat_template = TILED_TEMPLATE.replace("PLACEHOLDER", "<image>")
    return tokenizer


def tile_preprocessing(directory: Path, config: PretrainedConfig) -> None:
    """An image processor that cuts tiles of the vision tower's size, six at most (LLaVA-OneVision: nine), and what the
    whole processor is told of their tokens."""
    size = config.vision_config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    settings: dict[str, Any] = {
        "size": {"height": height, "width": width},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
    }
    if config.model_type == "llava_onevision":
        settings |= {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "image_grid_pinpoints": config.image_grid_pinpoints,
        }
    else:
        settings |= {
            # as published: InternVL's processor says otherwise when it calls the image processor
            "crop_to_patches": config.model_type == "ovis2",
            "image_processor_type": {"internvl": "GotOcr2ImageProcessor", "ovis2": "Ovis2ImageProcessor"}[
                config.model_type
            ],
            "min_patches": 1,
            "max_patches": 6,
        }
    (Path(directory) / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    processor: dict[str, Any] = {"image_seq_length": 9}
    if config.model_type == "llava_onevision":
        processor = {
            "num_image_tokens": 36,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": config.vision_aspect_ratio,
        }
    (Path(directory) / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def copy_preprocessing(directory: Path, model_type: str) -> None:
    """The demo's tokenizer, chat template and image processor, with the family's patch size."""
    for name in TOKENIZER_FILES:
        if (DEMO / name).is_file():
            shutil.copyfile(DEMO / name, Path(directory) / name)
    settings = json.loads((DEMO / "preprocessor_config.json").read_text())
    settings["patch_size"] = {"qwen3_vl": 16, "qwen2_5_vl": 14}[model_type]
    (Path(directory) / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
