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


def tiny_config(
    model_type: str,
    *,
    tie_word_embeddings: bool = False,
    token_ids: dict[str, int] | None = None,
    vision: dict[str, Any] | None = None,
    **text_overrides: Any,
) -> PretrainedConfig:
    """A family's config, 4 text layers and 3 vision blocks small. `vision` and the keywords override its defaults."""
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
    name = {"qwen3_vl": "Qwen3VLForConditionalGeneration", "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration"}
    model = getattr(transformers, name[model_type])._from_config(config, dtype=dtype)
    fill(model, seed)
    return model.eval()


def fill(model: nn.Module, seed: int = 0) -> None:
    """Overwrite every parameter with seeded values that keep activations near one, in the parameter's own dtype."""
    generator = torch.Generator().manual_seed(seed)
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter is head:
                noise = noise * 3 / parameter.shape[1] ** 0.5
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
        tokenizer = AutoTokenizer.from_pretrained(DEMO)
        token_ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in SPECIAL_TOKENS.items()}
        options = {"vocab_size": max(2048, len(tokenizer))} | options
    model = tiny_model(model_type, dtype, seed, token_ids=token_ids, **options)
    if has_tokenizer():
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(directory, max_shard_size="400KB" if sharded else "5GB")
    if has_tokenizer():
        copy_preprocessing(directory, model_type)
    return Path(directory)


def copy_preprocessing(directory: Path, model_type: str) -> None:
    """The demo's tokenizer, chat template and image processor, with the family's patch size."""
    for name in TOKENIZER_FILES:
        if (DEMO / name).is_file():
            shutil.copyfile(DEMO / name, Path(directory) / name)
    settings = json.loads((DEMO / "preprocessor_config.json").read_text())
    settings["patch_size"] = {"qwen3_vl": 16, "qwen2_5_vl": 14}[model_type]
    (Path(directory) / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
