"""InternVL2-8B in its published layout, with random weights: InternLM2-7B, InternViT-300M and the projector."""

import json
from pathlib import Path
from typing import Any

import torch
from _synthetic import write_tensors

TEXT = {
    "model_type": "internlm2",
    "architectures": ["InternLM2ForCausalLM"],
    "vocab_size": 92553,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "max_position_embeddings": 32768,
    "bias": False,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "model_type": "intern_vit_6b",
    "architectures": ["InternVisionModel"],
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 448,
    "patch_size": 14,
    "num_channels": 3,
    "qkv_bias": True,
    "qk_normalization": False,
    "norm_type": "layer_norm",
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
}
CONFIG = {
    "model_type": "internvl_chat",
    "architectures": ["InternVLChatModel"],
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "force_image_size": 448,
    "max_dynamic_patch": 12,
    "min_dynamic_patch": 1,
    "pad2square": False,
    "ps_version": "v2",
    "select_layer": -1,
    "template": "internlm2-chat",
    "torch_dtype": "bfloat16",
    "use_thumbnail": True,
    "llm_config": TEXT,
    "vision_config": VISION,
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Name and shape of every published tensor."""
    width, patches = 1024, (448 // 14) ** 2
    by_name: dict[str, tuple[int, ...]] = {
        "vision_model.embeddings.class_embedding": (1, 1, width),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, 14, 14),
        "vision_model.embeddings.patch_embedding.bias": (width,),
        "vision_model.embeddings.position_embedding": (1, patches + 1, width),
    }
    for i in range(24):
        layer = f"vision_model.encoder.layers.{i}"
        matrices = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        matrices |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        for name, shape in matrices.items():
            by_name |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
        vectors = ("ls1", "ls2", "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias")
        by_name |= {f"{layer}.{name}": (width,) for name in vectors}
    hidden, wide, kv = 4096, 14336, 8 * 128
    by_name["language_model.model.tok_embeddings.weight"] = (92553, hidden)
    for i in range(32):
        layer = f"language_model.model.layers.{i}"
        by_name |= {
            f"{layer}.attention.wqkv.weight": (hidden + 2 * kv, hidden),
            f"{layer}.attention.wo.weight": (hidden, hidden),
            f"{layer}.feed_forward.w1.weight": (wide, hidden),
            f"{layer}.feed_forward.w3.weight": (wide, hidden),
            f"{layer}.feed_forward.w2.weight": (hidden, wide),
            f"{layer}.attention_norm.weight": (hidden,),
            f"{layer}.ffn_norm.weight": (hidden,),
        }
    by_name |= {"language_model.model.norm.weight": (hidden,), "language_model.output.weight": (92553, hidden)}
    by_name |= {"mlp1.0.weight": (4 * width,), "mlp1.0.bias": (4 * width,)}
    by_name |= {"mlp1.1.weight": (hidden, 4 * width), "mlp1.1.bias": (hidden,)}
    by_name |= {"mlp1.3.weight": (hidden, hidden), "mlp1.3.bias": (hidden,)}
    return by_name


def write(directory: str) -> dict[str, Any]:
    """The job of a child: write the checkpoint."""
    total = write_tensors(Path(directory), shapes(), torch.bfloat16)
    (Path(directory) / "config.json").write_text(json.dumps(CONFIG, indent=2))
    return {"bytes": total}
