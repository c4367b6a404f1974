"""The grafts and decoders of published models, by their sizes, with random weights."""

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks._synthetic import config_small
from surgeon.memory.graft import Graft
from surgeon.memory.mixin import Mixin
from surgeon.memory.patched import RECORD, patched_config_class, patched_model_class
from surgeon.memory.pvm import PersistentVisualMemory
from surgeon.memory.rotary import Rope

PVM_8B = {"kind": "pvm", "layers": [8, 16, 24], "latent": 512, "visibility": "causal"}
SMALL_TEXT = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
SMALL_PVM = {"kind": "pvm", "layers": [1], "latent": 64, "visibility": "causal"}
COMEMO_2B = {
    "vocab_size": 92553,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
MIXIN_2B = {
    "kind": "mixin",
    "visibility": "causal",
    "layers": [3, 7, 11, 15, 19, 23],
    "num_heads": 16,
    "head_dim": 128,
    "intermediate": 8192,
    "rope_theta": 1e6,
    "eps": 1e-5,
}
SMALL_MIXIN = MIXIN_2B | {"layers": [1], "num_heads": 2, "head_dim": 32, "intermediate": 96}


def pvm(hidden: int, latent: int, intermediate: int, head_dim: int, kv_heads: int) -> PersistentVisualMemory:
    with torch.device("meta"):
        return PersistentVisualMemory(hidden, latent, intermediate, head_dim, kv_heads, 1e-6)


def mixin(hidden: int, heads: int, intermediate: int, head_dim: int) -> Mixin:
    with torch.device("meta"):
        return Mixin(hidden, heads, intermediate, Rope(head_dim, 1e6), 1e-5)


def real_grafts() -> dict[str, Graft]:
    """One block each, as the published recipes make it for the backbone's sizes."""
    return {
        "PVM, Qwen3-VL-8B": pvm(4096, 512, 1536, 128, 1),
        "PVM, Qwen3-VL-4B": pvm(2560, 512, 1945, 128, 1),
        "PVM, Qwen3-VL-2B": pvm(2048, 512, 1536, 128, 2),
        "mixin, CoMemo-2B": mixin(2048, 16, 8192, 128),
    }


def odd_grafts() -> dict[str, Graft]:
    """Small, with sizes that no tile divides."""
    return {"PVM, odd sizes": pvm(136, 64, 72, 32, 1), "mixin, odd sizes": mixin(136, 3, 72, 32)}


def qwen3_vl(text: dict[str, Any], record: dict[str, Any]) -> Any:
    """The config of a patched Qwen3-VL with these text sizes and a small vision tower."""
    return patched(config_small(**text), record)


def comemo(text: dict[str, Any], record: dict[str, Any]) -> Any:
    """The config of a patched InternVL with a Llama of these sizes, which InternLM2 converts to."""
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.InternVLConfig(
        text_config={"model_type": "llama", "max_position_embeddings": 32768, "rms_norm_eps": 1e-5} | text,
        vision_config=vision | {"image_size": [28, 28], "patch_size": [14, 14]},
        image_token_id=1,
        tie_word_embeddings=False,
    )
    return patched(config, record)


def patched(config: Any, record: dict[str, Any]) -> Any:
    """The config of a model with these grafts; without what checks one from outside, which a bare machine lacks."""
    values = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    plain: Any = type(config)
    return patched_config_class(plain).from_dict({**values, RECORD: {"grafts": [record]}})


def make_model(config: Any, dtype: torch.dtype, device: str) -> Any:
    """A patched model with random weights, created where it will run, its grafts as if they had been trained."""
    (record,) = getattr(config, RECORD)["grafts"]
    arguments = ("model.language_model", "pre_norm", ("image_token_id",))
    classes = {
        "pvm": patched_model_class(transformers.Qwen3VLForConditionalGeneration, *arguments, PersistentVisualMemory),
        "mixin": patched_model_class(transformers.InternVLForConditionalGeneration, *arguments, Mixin),
    }
    torch.manual_seed(0)
    with torch.device(device):
        model = classes[record["kind"]]._from_config(config, dtype=dtype)
    open_grafts(model)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def open_grafts(model: nn.Module) -> None:
    """Gates open, norms that are not all ones, matrices that keep what they multiply near its size."""
    for module in model.modules():
        if not isinstance(module, Graft):
            continue
        for name, parameter in module.named_parameters():
            noise: Tensor = torch.randn_like(parameter)
            if name in module.gates:
                parameter.copy_(0.6 + 0.2 * noise.abs())
            else:
                parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else noise / parameter.shape[1] ** 0.5)
