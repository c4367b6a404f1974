"""PVM as published: a Qwen3-VL with the authors' blocks in it, whose config still calls itself qwen3_vl."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgeon.checkpoint.reader import Checkpoint
from surgeon.errors import CheckpointError, OptionError
from surgeon.importers._layout import Importer, Layout, Rule, rule, setting
from surgeon.side_files import IMAGE_PROCESSOR_FILES, TOKENIZER_FILES, copy_side_files
from surgeon.source_card import card_files

_BLOCK = re.compile(r"model\.language_model\.layers\.(\d+)\.pvm_block\..+")
_LATENT = "model.language_model.layers.{}.pvm_block.text_reducer.weight"
_LAYERS_KEY, _LATENT_KEY = "pvm_layers", "pvm_hidden_size"
_WHERE = "text_config of config.json"


class PVMQwen3VL(Importer):
    """A Qwen3-VL with PVM, which becomes a patched one."""

    model_type = "qwen3_vl"

    def recognises(self, config: Mapping[str, Any], tensors: Collection[str]) -> bool:
        """The plain family has this model_type too, without the blocks' tensors and without their layers in the
        config."""
        if not super().recognises(config, tensors):
            return False
        return bool(_declared(config, _LAYERS_KEY)) or any(map(_BLOCK.fullmatch, tensors))

    def read(self, source: Checkpoint, image_token_id: int | None = None) -> Layout:
        """As `Importer.read`. Layers and latent width are those of the tensors. Raises CheckpointError where the config
        says otherwise, and for blocks of another shape than PVM's."""
        config = source.config
        text = setting(config, "text_config", dict)
        token_id = setting(config, "image_token_id", int)
        if image_token_id not in (None, token_id):
            raise OptionError(f"image token id {image_token_id} was asked for, and config.json says {token_id}")
        if text.get("hidden_act", "silu") != "silu":
            raise CheckpointError(f"hidden_act is {text['hidden_act']!r} in {_WHERE}: a PVM branch computes with silu")
        layers, latent = _blocks(source)
        plain = {key: value for key, value in config.items() if key not in ("auto_map", _LAYERS_KEY, _LATENT_KEY)}
        plain["text_config"] = {k: v for k, v in text.items() if k not in ("auto_map", _LAYERS_KEY, _LATENT_KEY)}
        graft = {
            "kind": "pvm",
            "layers": layers,
            "latent": latent,
            "visibility": "all",  # as published: tokens before an image see it too
        }
        files = QwenFiles(source)
        return Layout(
            config=plain,
            rules=_rules(),
            text_model=str(text.get("model_type", "qwen3_vl_text")),
            side_files=files,
            image_token_id=token_id,
            record={"grafts": [graft], "passes": []},
            warnings=files.missing(),
        )


IMPORTER = PVMQwen3VL()


@dataclass
class QwenFiles:
    """What stands beside the weights, which transformers reads as it is. Only the code, and what leads to it, is left
    behind."""

    source: Checkpoint

    def write(self, directory: Path, config: dict[str, Any]) -> list[str]:
        """As `SideFiles.write`."""
        cards = [path.name for path in card_files(self.source)]  # which have other names beside the target's own
        copy_side_files(self.source, directory, own_files=cards, trust_remote_code=False)
        return []

    def missing(self) -> list[str]:
        """A warning for each part without which the model cannot be prompted."""
        parts = {"tokenizer": TOKENIZER_FILES, "image processor": IMAGE_PROCESSOR_FILES}
        return [
            f"the checkpoint has no {part}, so the imported one has none: add one ({' or '.join(names)}) before "
            "prompting it"
            for part, names in parts.items()
            if not any((self.source.directory / name).is_file() for name in names)
        ]


def _declared(config: Mapping[str, Any], key: str) -> Any:
    """A setting of the authors' config class, which has it in text_config."""
    text = config.get("text_config")
    declared = text.get(key) if isinstance(text, dict) else None
    return config.get(key) if declared is None else declared


def _blocks(source: Checkpoint) -> tuple[list[int], int]:
    """The layers that have a block, and the width inside. Raises CheckpointError where config and tensors disagree."""
    layers = sorted({int(match[1]) for name in source.tensors if (match := _BLOCK.fullmatch(name))})
    declared = _declared(source.config, _LAYERS_KEY)
    if declared is not None and (not isinstance(declared, list) or {*map(str, declared)} != {*map(str, layers)}):
        raise CheckpointError(
            f"{_LAYERS_KEY} is {declared!r} in config.json, and the tensors have pvm_block at layers {layers}"
        )
    latents = {}
    for layer in layers:
        reducer = source.tensors.get(_LATENT.format(layer))
        if reducer is None or len(reducer.shape) != 2:
            raise CheckpointError(f"the checkpoint has no matrix {_LATENT.format(layer)}, which PVM has at each layer")
        latents[layer] = reducer.shape[0]
    (latent, *others) = sorted(set(latents.values()))
    if others:
        raise CheckpointError(f"the pvm_blocks are of different widths, by layer: {latents}")
    declared_latent = _declared(source.config, _LATENT_KEY)
    if declared_latent not in (None, latent):
        raise CheckpointError(
            f"{_LATENT_KEY} is {declared_latent!r} in config.json, and the tensors' width is {latent}"
        )
    return layers, latent


def _rules() -> list[Rule]:
    theirs, ours = r"model\.language_model\.layers\.(\d+)\.pvm_block\.", r"model.language_model.layers.\1.pvm."
    return [
        rule(theirs + r"text_reducer\.weight", ours + "text_proj.weight"),
        rule(theirs + r"vision_reducer\.weight", ours + "visual_proj.weight"),
        rule(theirs + r"input_norm\.weight", ours + "input_norm.weight"),
        rule(theirs + r"cross_attn\.([qkvo]_proj|[qk]_norm)\.weight", ours + r"\2.weight"),
        rule(theirs + r"post_attn_norm\.weight", ours + "post_attention_norm.weight"),
        rule(theirs + r"mlp\.(gate_proj|up_proj|down_proj)\.weight", ours + r"\2.weight"),
        rule(theirs + r"output_expander\.weight", ours + "output_proj.weight"),
        rule(theirs + "gate_alpha", ours + "alpha"),
        rule(r"((?:(?!\.pvm_block\.).)+)", r"\1"),  # everything else is Qwen3-VL's, as it is
    ]
