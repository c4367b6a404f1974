"""InternVL and CoMemo checkpoints in their published layouts, small, for tests of the importers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

GOLDEN = Path(__file__).parent / "data" / "internvl2_a"
IMAGE_TOKEN_ID = 500
Change = Callable[[dict[str, Any]], Any]


def golden_checkpoint(
    directory: Path,
    name: str = "internvl2",
    change: Change = lambda config: None,
    change_tensors: Change = lambda t: None,
) -> Path:
    """A copy of the golden "internvl2" or "comemo", after `change(config)` and `change_tensors(tensors)`."""
    directory.mkdir(parents=True)
    config, tensors = (
        json.loads((GOLDEN / name / "config.json").read_text()),
        load_file(GOLDEN / name / "model.safetensors"),
    )
    change(config)
    change_tensors(tensors)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def expected_tensors() -> dict[str, torch.Tensor]:
    """The golden input, positions, visual embeddings and logits."""
    return load_file(GOLDEN / "expected.safetensors")


def publish(model: PreTrainedModel, directory: Path, text: str, shards: int = 1) -> Path:
    """A transformers InternVL in the layout that InternVL is published in. `text`: the text model inside, internlm2 for
    a Llama."""
    directory.mkdir(parents=True)
    config = model.config
    tensors: dict[str, torch.Tensor] = {}
    state = model.state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    for name, tensor in state.items():
        tensors |= _published(name, tensor, state, config, text)
    parts = [dict(list(tensors.items())[i::shards]) for i in range(shards)]
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    for file, part in zip(names, parts, strict=True):
        save_file({k: v.contiguous() for k, v in part.items()}, directory / file, {"format": "pt"})
    weight_map = {key: file for file, part in zip(names, parts, strict=True) for key in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(_published_config(config, text)))
    return directory


def _published_config(config: Any, text: str) -> dict[str, Any]:
    llm, vision = config.text_config.to_dict(), config.vision_config.to_dict()
    rope = llm.pop("rope_parameters")
    llm |= {"rope_theta": rope["rope_theta"], "rope_scaling": None, "auto_map": {"AutoModel": "modeling.Model"}}
    if rope["rope_type"] != "default":
        llm["rope_scaling"] = {"type": rope["rope_type"], "factor": rope["factor"]}
    if text == "internlm2":
        llm |= {"model_type": text, "architectures": ["InternLM2ForCausalLM"], "bias": llm.pop("attention_bias")}
        llm.pop("head_dim")
    else:
        llm["architectures"] = [f"{text.capitalize()}ForCausalLM"]
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "model_type": "internvl_chat",
        "downsample_ratio": config.downsample_ratio,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "force_image_size": vision["image_size"][0],
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 6,
        "ps_version": "v2",
        "select_layer": config.vision_feature_layer,
        "template": "internlm2-chat" if text == "internlm2" else "Hermes-2",
        "torch_dtype": "float32",
        "llm_config": llm,
        "vision_config": {
            "hidden_size": vision["hidden_size"],
            "intermediate_size": vision["intermediate_size"],
            "num_hidden_layers": vision["num_hidden_layers"],
            "num_attention_heads": vision["num_attention_heads"],
            "image_size": vision["image_size"][0],
            "patch_size": vision["patch_size"][0],
            "qkv_bias": vision["attention_bias"],
            "qk_normalization": vision["use_qk_norm"],
            "norm_type": vision["norm_type"],
            "layer_norm_eps": vision["layer_norm_eps"],
            "hidden_act": vision["hidden_act"],
        },
    }


def _published(name: str, tensor: torch.Tensor, state: Any, config: Any, text: str) -> dict[str, torch.Tensor]:
    """The published tensor that this one is, or is the first part of; nothing for the other parts of a fused one."""
    if name.startswith("model.vision_tower."):
        return _published_vision(name.removeprefix("model.vision_tower."), tensor, state)
    if name.startswith("model.multi_modal_projector."):
        module, _, kind = name.removeprefix("model.multi_modal_projector.").partition(".")
        return {f"mlp1.{ {'layer_norm': 0, 'linear_1': 1, 'linear_2': 3}[module] }.{kind}": tensor}
    key = name.replace("model.language_model.", "model.")
    if text != "internlm2":
        return {f"language_model.{key}": tensor}
    if ".k_proj." in key or ".v_proj." in key:
        return {}
    if ".q_proj." in key:
        text_config = config.text_config
        kv, hd = text_config.num_key_value_heads, text_config.head_dim
        heads = [state[name.replace("q_proj", part)].split(hd) for part in ("q_proj", "k_proj", "v_proj")]
        groups = len(heads[0]) // kv
        tensor = torch.cat(
            [part for i in range(kv) for part in (*heads[0][i * groups : (i + 1) * groups], heads[1][i], heads[2][i])]
        )
    for ours, theirs in {
        "embed_tokens": "tok_embeddings",
        "lm_head": "output",
        "self_attn.q_proj": "attention.wqkv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }.items():
        key = key.replace(ours, theirs)
    return {f"language_model.{key}": tensor}


def _published_vision(name: str, tensor: torch.Tensor, state: Any) -> dict[str, torch.Tensor]:
    if ".k_proj." in name or ".v_proj." in name:
        return {}
    if ".q_proj." in name:
        parts = [state["model.vision_tower." + name.replace("q_proj", f"{p}_proj")] for p in "qkv"]
        tensor = torch.cat(parts)
    for ours, theirs in {
        "encoder.layer.": "encoder.layers.",
        "cls_token": "class_embedding",
        "position_embeddings": "position_embedding",
        "patch_embeddings.projection": "patch_embedding",
        "attention.q_proj": "attn.qkv",
        "attention.projection_layer": "attn.proj",
        "attention.": "attn.",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "lambda_": "ls",
    }.items():
        name = name.replace(ours, theirs)
    return {f"vision_model.{name}": tensor}
