"""Small random models and checkpoints of the supported families, for tests. Nothing in them is trivially 0 or 1."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel

from family_case import TOKEN_IDS, family_cases
from surgeon.families import family

__all__ = ["TOKEN_IDS", "fill", "tiny_checkpoint", "tiny_config", "tiny_model"]

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo" / "qwen3-vl-tiny"
QWEN_TYPES = ("qwen3_vl", "qwen2_5_vl")
TILED_TYPES = ("internvl", "ovis2")
PLAIN_TYPES = (*TILED_TYPES, "llava_onevision")
"""Families whose decoder is a plain language model, of one of `TEXT_TYPES`."""
TEXT_TYPES = ("llama", "qwen2", "qwen3")
FAMILIES = tuple(family_cases())
"""Every family that has a case, which are all that there are."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def tiny_config(
    model_type: str,
    *,
    tie_word_embeddings: bool = False,
    token_ids: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    **options: Any,
) -> PretrainedConfig:
    """A family's config, 4 text layers and 3 vision blocks small. `vision` and the keywords override its defaults; for
    families that take several text models, `text_type` says which (default: Qwen2), and `top` overrides what is in
    neither part."""
    others = {name: options.pop(name) for name in ("text_type", "top") if name in options}
    return family_cases()[model_type].config(
        text=options, vision=vision or {}, token_ids=token_ids or {}, tie_word_embeddings=tie_word_embeddings, **others
    )


def tiny_model(
    model_type: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    tie_word_embeddings: bool = False,
    token_ids: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """A small random model: no weight, bias or norm is trivial, and logits spread over several units.

    `token_ids` replaces ids of special tokens; `vision` and the other keywords replace config values.
    """
    config = tiny_config(
        model_type, tie_word_embeddings=tie_word_embeddings, token_ids=token_ids, vision=vision, **options
    )
    model: PreTrainedModel = getattr(transformers, family(model_type).model_class)._from_config(config, dtype=dtype)
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
    directory, case, token_ids = Path(directory), family_cases()[model_type], {}
    if has_tokenizer():
        tokenizer = demo_tokenizer(model_type)
        token_ids = {
            key: tokenizer.convert_tokens_to_ids(token if isinstance(token, str) else list(token))
            for key, token in case.special_tokens.items()
        }
        options = {"vocab_size": max(2048, len(tokenizer))} | options
    model = tiny_model(model_type, dtype, seed, token_ids=token_ids, **options)
    if has_tokenizer():
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(directory, max_shard_size="400KB" if sharded else "5GB")
    if has_tokenizer():
        if case.chat_template is None:
            copy_tokenizer(directory)
        else:
            tokenizer.save_pretrained(directory)
        write_processors(directory, model_type, model.config)
    return directory


def copy_tokenizer(directory: Path) -> None:
    """The demo's tokenizer and chat template, as they are."""
    for name in TOKENIZER_FILES:
        if (DEMO / name).is_file():
            shutil.copyfile(DEMO / name, directory / name)


def write_processors(directory: Path, model_type: str, config: PretrainedConfig) -> None:
    """Write the settings of a family's image processor and of its whole processor."""
    case = family_cases()[model_type]
    for name, settings in (
        ("preprocessor_config.json", case.preprocessor(config)),
        ("processor_config.json", case.processor(config)),
    ):
        if settings is not None:
            (directory / name).write_text(json.dumps(settings, indent=2) + "\n")


def demo_tokenizer(model_type: str) -> Any:
    """The demo's tokenizer, with a family's special tokens and its chat template."""
    case = family_cases()[model_type]
    named = {} if case.named_tokens is None else {"extra_special_tokens": dict(case.named_tokens)}
    tokenizer = AutoTokenizer.from_pretrained(DEMO, **named)
    tokenizer.add_tokens(list(case.added_tokens), special_tokens=True)
    if case.chat_template is not None:
        tokenizer.chat_template = case.chat_template
    return tokenizer
