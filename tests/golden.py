"""The PVM authors' tiny model under this tool's names, for tests."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from checkpoints import copy_preprocessing

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
    copy_preprocessing(directory, "qwen3_vl")
    return directory


def expected_tensors() -> dict[str, torch.Tensor]:
    """The published model's input, logits and greedy tokens."""
    return load_file(DATA / "pvm_model_a" / "expected.safetensors")
