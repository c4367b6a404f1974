"""What the authors of PVM, CoMemo and VisMem published, under this tool's names, for tests."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from checkpoints import copy_tokenizer, tiny_config, write_processors
from surgeon.memory.mixin import Mixin
from surgeon.memory.query_builder import QueryBuilder
from surgeon.memory.rotary import Rope

DATA = Path(__file__).parent / "data"
PUBLISHED_NAMES = {
    "text_reducer": "text_proj",
    "vision_reducer": "visual_proj",
    "output_expander": "output_proj",
    "gate_alpha": "alpha",
    "post_attn_norm": "post_attention_norm",
    "cross_attn.": "",
    "mlp.": "",
}


def our_name(published: str) -> str:
    """A PVM block's parameter name: the authors' -> ours."""
    for theirs, ours in PUBLISHED_NAMES.items():
        published = published.replace(theirs, ours)
    return published


def published_checkpoint(directory: Path) -> Path:
    """The published model as a patched checkpoint. Its tokenizer and image processor are the demo's: it has none."""
    source = DATA / "pvm_model_a"
    config = json.loads((source / "config.json").read_text())
    pvm = config.pop("pvm")
    config |= {"model_type": "surgeon_qwen3_vl", "surgeon": {"grafts": [{"kind": "pvm", **pvm}], "passes": []}}
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    weights = load_file(source / "model.safetensors")

    def name(key: str) -> str:
        head, block, tail = key.partition("pvm_block.")
        return f"{head}pvm.{our_name(tail)}" if block else key

    save_file({name(k): v for k, v in weights.items()}, directory / "model.safetensors", {"format": "pt"})
    copy_tokenizer(directory)
    write_processors(directory, "qwen3_vl", tiny_config("qwen3_vl"))
    return directory


def expected_tensors() -> dict[str, torch.Tensor]:
    """The published model's input, logits and greedy tokens."""
    return load_file(DATA / "pvm_model_a" / "expected.safetensors")


PUBLISHED_MIXIN_NAMES = {
    "cross_attention_norm.weight": "norm.weight",
    "cross_attn.to_q.weight": "q_proj.weight",
    "cross_attn.to_out.weight": "o_proj.weight",
    "attn_gate": "attn_gate",
    "ff_gate": "ff_gate",
    "ffn_norm_2.weight": "ffn_norm.weight",
    "ffn_2.w1.weight": "gate_proj.weight",
    "ffn_2.w2.weight": "down_proj.weight",
    "ffn_2.w3.weight": "up_proj.weight",
}


def published_mixin() -> tuple[Mixin, dict[str, torch.Tensor]]:
    """CoMemo's block under this tool's names, and the tensors stored with it: inputs and output."""
    tensors = load_file(DATA / "mixin_block_a.safetensors")
    block = Mixin(64, num_heads=4, intermediate_size=128, rope=Rope(16, 1e6), eps=1e-5)
    weights = {ours: tensors[f"weight.{theirs}"] for theirs, ours in PUBLISHED_MIXIN_NAMES.items()}
    weights["k_proj.weight"], weights["v_proj.weight"] = tensors["weight.cross_attn.to_kv.weight"].chunk(2)
    block.load_state_dict(weights)
    return block, tensors


PUBLISHED_QUERY_BUILDER_NAMES = {
    "encoder.layers.": "layers.",
    "self_attn.in_proj_": "qkv.",
    "self_attn.out_proj": "out",
    "linear1": "up",
    "linear2": "down",
    "norm1": "attention_norm",
    "norm2": "mlp_norm",
    "q_init": "query_init",
    "pos_emb": "positions",
}


def published_query_builder() -> tuple[QueryBuilder, dict[str, torch.Tensor]]:
    """VisMem's query builder under this tool's names, and the tensors stored with it: inputs and outputs."""
    tensors = load_file(DATA / "query_builder.safetensors")

    def name(published: str) -> str:
        for theirs, ours in PUBLISHED_QUERY_BUILDER_NAMES.items():
            published = published.replace(theirs, ours)
        return "norm" + published.removeprefix("ln") if published.startswith("ln.") else published

    weights = {name(key.removeprefix("weight.")): t for key, t in tensors.items() if key.startswith("weight.")}
    weights["positions"] = weights["positions"][0]
    builder = QueryBuilder(64, len(weights["query_init"]))
    builder.load_state_dict(weights)
    return builder, tensors
