"""The text models inside an InternVL: how each becomes one of transformers' own.

A new one is an entry in TEXT_MODELS.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import transformers

from surgeon.errors import CheckpointError
from surgeon.importers._layout import Rule, Take, rule, setting

_WHERE = "llm_config of config.json"
LAYER = r"language_model\.model\.layers\.(\d+)\."
"""How the pattern of every rule for a decoder layer's tensors begins."""
_OURS = r"model.language_model.layers.\1."


@dataclasses.dataclass(frozen=True)
class TextModel:
    """A text model's llm_config -> the text_config of transformers, and the rules for its tensors."""

    architecture: str
    config: Callable[[dict[str, Any]], dict[str, Any]]
    rules: Callable[[dict[str, Any]], list[Rule]]


def text_model(llm_config: dict[str, Any]) -> tuple[str, TextModel]:
    """The text model of an llm_config, by model_type, else by architecture.

    Raises CheckpointError for one that is not known.
    """
    architecture = next(iter(llm_config.get("architectures") or []), None)
    name = llm_config.get("model_type")
    for model_type, candidate in TEXT_MODELS.items():
        # the same model_type may stand for several architectures, of which one is known
        if name in (model_type, None) and architecture in (candidate.architecture, None) and (name or architecture):
            return model_type, candidate
    described = " / ".join(str(part) for part in (name, architecture) if part) or "nothing"
    raise CheckpointError(
        f"the text model is {described}, which cannot be converted; known: "
        + ", ".join(f"{model_type} / {candidate.architecture}" for model_type, candidate in TEXT_MODELS.items())
    )


# -- text models that transformers has ---------------------------------------------------------------------------
def _native_config(config_class: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def convert(llm: dict[str, Any]) -> dict[str, Any]:
        # Configs of that time list every default of every model: take what the class has, and no more.
        common = {f.name for f in dataclasses.fields(transformers.PretrainedConfig)}
        own_fields = {f.name for f in dataclasses.fields(config_class)} - common
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            setting(llm, key, int, _WHERE)
        text_config = {key: value for key, value in llm.items() if key in own_fields and value is not None}
        text_config.setdefault("rope_parameters", rope_parameters(llm, theta=10000.0))
        return {**text_config, "model_type": config_class.model_type}

    return convert


def _native_rules(llm: dict[str, Any]) -> list[Rule]:
    return [
        rule(r"language_model\.model\.(embed_tokens|norm)\.weight", r"model.language_model.\1.weight"),
        rule(LAYER + r"self_attn\.rotary_emb\.inv_freq", {}),
        rule(LAYER + r"(.+)", _OURS + r"\2"),
        rule(r"language_model\.lm_head\.weight", "lm_head.weight"),
    ]


# -- InternLM2: a Llama with its own names and one fused projection ----------------------------------------------
def _internlm2_config(llm: dict[str, Any]) -> dict[str, Any]:
    heads = setting(llm, "num_attention_heads", int, _WHERE)
    hidden_size = setting(llm, "hidden_size", int, _WHERE)
    return {
        "model_type": "llama",
        "vocab_size": setting(llm, "vocab_size", int, _WHERE),
        "hidden_size": hidden_size,
        "intermediate_size": setting(llm, "intermediate_size", int, _WHERE),
        "num_hidden_layers": setting(llm, "num_hidden_layers", int, _WHERE),
        "num_attention_heads": heads,
        "num_key_value_heads": llm.get("num_key_value_heads") or heads,
        "head_dim": hidden_size // heads,
        "hidden_act": llm.get("hidden_act", "silu"),
        "max_position_embeddings": llm.get("max_position_embeddings", 2048),
        "initializer_range": llm.get("initializer_range", 0.02),
        "rms_norm_eps": llm.get("rms_norm_eps", 1e-6),
        "attention_bias": llm.get("bias", True),
        "tie_word_embeddings": llm.get("tie_word_embeddings", False),
        "bos_token_id": llm.get("bos_token_id", 1),
        "eos_token_id": llm.get("eos_token_id", 2),
        "pad_token_id": llm.get("pad_token_id", 0),
        "rope_parameters": rope_parameters(llm, theta=10000.0),
    }


def _internlm2_rules(llm: dict[str, Any]) -> list[Rule]:
    config = _internlm2_config(llm)
    kv_heads, head_dim = config["num_key_value_heads"], config["head_dim"]
    groups = config["num_attention_heads"] // kv_heads

    def fused(part: slice) -> Take:
        """wqkv is [kv_heads, groups + 2, head_dim] by rows: each key-value head's queries, its key, its value."""

        def take(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.unflatten(0, (kv_heads, groups + 2, head_dim))[:, part].flatten(0, 2)

        return take

    return [
        rule(r"language_model\.model\.tok_embeddings\.weight", "model.language_model.embed_tokens.weight"),
        rule(r"language_model\.model\.norm\.weight", "model.language_model.norm.weight"),
        rule(r"language_model\.output\.weight", "lm_head.weight"),
        rule(LAYER + r"attention_norm\.weight", _OURS + "input_layernorm.weight"),
        rule(LAYER + r"ffn_norm\.weight", _OURS + "post_attention_layernorm.weight"),
        rule(
            LAYER + r"attention\.wqkv\.(weight|bias)",
            {
                _OURS + r"self_attn.q_proj.\2": fused(slice(0, groups)),
                _OURS + r"self_attn.k_proj.\2": fused(slice(groups, groups + 1)),
                _OURS + r"self_attn.v_proj.\2": fused(slice(groups + 1, groups + 2)),
            },
        ),
        rule(LAYER + r"attention\.wo\.(weight|bias)", _OURS + r"self_attn.o_proj.\2"),
        rule(LAYER + r"feed_forward\.w1\.weight", _OURS + "mlp.gate_proj.weight"),
        rule(LAYER + r"feed_forward\.w3\.weight", _OURS + "mlp.up_proj.weight"),
        rule(LAYER + r"feed_forward\.w2\.weight", _OURS + "mlp.down_proj.weight"),
        rule(LAYER + r"attention\.rotary_emb\.inv_freq", {}),
    ]


def rope_parameters(llm: dict[str, Any], theta: float) -> dict[str, Any]:
    """transformers' rope_parameters of an llm_config's rope_theta and rope_scaling.

    InternLM2's "dynamic" and "linear" are the formulas of transformers' types of those names: dynamic NTK stretches the
    base by (factor * length / max_position_embeddings - (factor - 1)) ** (dim / (dim - 2)) beyond that length.
    Raises CheckpointError for another kind.
    """
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": float(llm.get("rope_theta") or theta)}
    scaling = llm.get("rope_scaling")
    if scaling is None:
        return parameters
    if not isinstance(scaling, dict):
        raise CheckpointError(f"rope_scaling is {scaling!r} in {_WHERE}, where an object is needed")
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind not in ("dynamic", "linear", "yarn", "llama3", "default"):
        raise CheckpointError(f"rope_scaling of type {kind!r} cannot be carried over; known: dynamic, linear")
    return {**parameters, **{k: v for k, v in scaling.items() if k != "type"}, "rope_type": kind}


TEXT_MODELS = {
    "internlm2": TextModel("InternLM2ForCausalLM", _internlm2_config, _internlm2_rules),
    "qwen2": TextModel("Qwen2ForCausalLM", _native_config(transformers.Qwen2Config), _native_rules),
    "qwen3": TextModel("Qwen3ForCausalLM", _native_config(transformers.Qwen3Config), _native_rules),
    "llama": TextModel("LlamaForCausalLM", _native_config(transformers.LlamaConfig), _native_rules),
}
