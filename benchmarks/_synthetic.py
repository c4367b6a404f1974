"""Checkpoints with random weights, of any size, for the benchmarks."""

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel

from surgeon.checkpoint import PlannedTensor, write_safetensors

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo" / "qwen3-vl-tiny"
_SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json")
_SPECIAL_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
_SHARD = 5 * 10**9
_POOL = 1 << 24


QWEN3_VL_8B = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
"""The sizes of its text model."""


def config_8b() -> PretrainedConfig:
    """Qwen3-VL-8B's sizes."""
    text = QWEN3_VL_8B | {"max_position_embeddings": 262144}
    vision = {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "deepstack_visual_indexes": [8, 16, 24],
        "num_position_embeddings": 2304,
    }
    return _config(text, vision, {})


def config_small(**text: Any) -> PretrainedConfig:
    """A text model of these sizes with a small vision tower, and the demo tokenizer's special tokens."""
    vision = {
        "depth": 3,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "deepstack_visual_indexes": [0, 1],
        "num_position_embeddings": 256,
    }
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in _SPECIAL_TOKENS.items()}
    return _config({"max_position_embeddings": 32768} | text, vision, ids)


def _config(text: dict[str, Any], vision: dict[str, Any], token_ids: dict[str, int]) -> PretrainedConfig:
    half = text["head_dim"] // 2
    side = half * 5 // 16
    rope = {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [half - 2 * side, side, side],
        "mrope_interleaved": True,
    }
    return transformers.Qwen3VLConfig(
        text_config={"rope_parameters": rope, "rms_norm_eps": 1e-6, "tie_word_embeddings": False} | text,
        vision_config={"patch_size": 16, "out_hidden_size": text["hidden_size"]} | vision,
        tie_word_embeddings=False,
        architectures=["Qwen3VLForConditionalGeneration"],
        **token_ids,
    )


def write_tensors(directory: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    """Write random weights of these names and shapes with their index, shard by shard, all on the disk; -> their bytes.

    Values repeat every `_POOL` elements, so that writing is bound by the disk and not by the generator.
    """
    generator = torch.Generator().manual_seed(0)
    pool = (torch.randn(_POOL, generator=generator) * 0.02).to(dtype)

    def tensor(shape: tuple[int, ...]) -> torch.Tensor:
        flat = torch.empty(math.prod(shape), dtype=dtype)
        for start in range(0, len(flat), _POOL):
            flat[start : start + _POOL] = pool[: len(flat) - start]
        return flat.view(shape) if len(shape) > 1 else flat.view(shape) + 1

    shards: list[list[PlannedTensor]] = [[]]
    for name, shape in shapes.items():
        plan = PlannedTensor(name, dtype, shape, lambda shape=shape: tensor(shape))  # type: ignore[misc]
        if shards[-1] and sum(item.nbytes for item in shards[-1]) + plan.nbytes > _SHARD:
            shards.append([])
        shards[-1].append(plan)

    directory.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        path = directory / f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(path, shard)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        weight_map |= {item.name: path.name for item in shard}
    total = sum(item.nbytes for shard in shards for item in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return total


def write_checkpoint(directory: Path, config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Write random weights for every tensor of the model, its config and the demo's tokenizer; -> bytes of weights."""
    with torch.device("meta"):
        model = transformers.Qwen3VLForConditionalGeneration._from_config(config, dtype=dtype)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    total = write_tensors(directory, shapes, dtype)
    config.dtype = dtype
    config.save_pretrained(directory)
    for name in _SIDE_FILES:
        shutil.copyfile(DEMO / name, directory / name)
    return total


def random_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A loaded fp32 model whose activations stay near one, so that its logits can be compared."""
    model: PreTrainedModel = transformers.Qwen3VLForConditionalGeneration._from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
    return model.eval()


def save(model: PreTrainedModel, directory: Path) -> None:
    """A model as a checkpoint with the demo's tokenizer."""
    model.save_pretrained(directory)
    for name in _SIDE_FILES:
        shutil.copyfile(DEMO / name, directory / name)


def write_8b(directory: str) -> dict[str, Any]:
    """The job of a child: write the 8B checkpoint."""
    return {"bytes": write_checkpoint(Path(directory), config_8b(), torch.bfloat16)}
