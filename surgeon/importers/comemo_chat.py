"""CoMemo as published (CoMemoChatModel): an InternVL2 with mixin layers, trained with RoPE-DHR in column order."""

import re
from typing import Any

from surgeon.checkpoint.reader import Checkpoint
from surgeon.errors import CheckpointError
from surgeon.importers._layout import Layout, Rule, rows, rule, setting
from surgeon.importers._text_models import LAYER
from surgeon.importers.internvl_chat import InternVLChat

# Fixed in the authors' code, not in their configs.
_ROPE_THETA, _EPS = 1e6, 1e-5
_WHERE = "mixin_config of config.json"


class CoMemoChat(InternVLChat):
    """CoMemo, which becomes internvl with mixin grafts."""

    model_type = "comemo_chat"

    def read(self, source: Checkpoint, image_token_id: int | None = None) -> Layout:
        """As `Importer.read`. Raises CheckpointError as for internvl_chat, and for mixin layers of another kind."""
        layout = super().read(source, image_token_id)
        layout.record = _record(source.config, layout.config)
        layout.rules = [*_mixin_rules(), *map(_wrapped, layout.rules)]
        return layout


IMPORTER = CoMemoChat()


def _record(config: dict[str, Any], internvl: dict[str, Any]) -> dict[str, Any]:
    """The record of the mixin layers and of how the tiles stand in the sequence. `internvl`: the converted config."""
    if not (config.get("use_thumbnail") and config.get("dynamic_image_size")):
        raise CheckpointError(
            "use_thumbnail or dynamic_image_size is off in config.json: RoPE-DHR gives tiles the positions of a "
            "thumbnail, so there must be one"
        )
    text, mixin = internvl["text_config"], setting(config, "mixin_config", dict)
    every = setting(mixin, "mixin_every_n_layers", int, _WHERE)
    depth, hidden_size = text["num_hidden_layers"], text["hidden_size"]
    if not 1 <= every <= depth:
        raise CheckpointError(f"mixin_every_n_layers is {every}, and the decoder has {depth} layers")
    for key in ("language_dim", "vision_dim"):
        if mixin.get(key, hidden_size) != hidden_size:
            raise CheckpointError(f"{key} is {mixin[key]} in {_WHERE}, and the decoder's hidden size {hidden_size}")
    graft = {
        "kind": "mixin",
        "layers": list(range(every - 1, depth, every)),
        "num_heads": setting(mixin, "num_heads", int, _WHERE),
        "head_dim": setting(mixin, "head_dim", int, _WHERE),
        "intermediate": setting(mixin, "intermediate_size", int, _WHERE),
        "rope_theta": _ROPE_THETA,
        "eps": _EPS,
        "visibility": "all",  # as published: tokens before an image see it too
    }
    return {
        "grafts": [graft],
        "passes": [],
        "layout": {"side": int(internvl["image_seq_length"] ** 0.5), "thumbnail": "last"},
        "positions": {"scheme": "rope_dhr", "tile_order": "column"},
        "allocation": "both",
    }


def _wrapped(plain: Rule) -> Rule:
    """The rule for the same tensor in a decoder layer that is wrapped together with its mixin layer, as all are."""
    pattern = plain.pattern.pattern
    return Rule(re.compile(pattern.replace(LAYER, LAYER + r"decoder_layer\.")), plain.targets)


def _mixin_rules() -> list[Rule]:
    theirs = LAYER + r"gated_cross_attn_layer\."
    ours = r"model.language_model.layers.\1.mixin."
    return [
        rule(theirs + r"cross_attention_norm\.weight", ours + "norm.weight"),
        rule(theirs + r"cross_attn\.to_q\.weight", ours + "q_proj.weight"),
        rule(
            theirs + r"cross_attn\.to_kv\.weight",
            {ours + "k_proj.weight": rows(0, 2), ours + "v_proj.weight": rows(1, 2)},
        ),
        rule(theirs + r"cross_attn\.to_out\.weight", ours + "o_proj.weight"),
        rule(theirs + r"(attn_gate|ff_gate)", ours + r"\2"),
        rule(theirs + r"ffn_norm_2\.weight", ours + "ffn_norm.weight"),
        rule(theirs + r"ffn_2\.w1\.weight", ours + "gate_proj.weight"),
        rule(theirs + r"ffn_2\.w3\.weight", ours + "up_proj.weight"),
        rule(theirs + r"ffn_2\.w2\.weight", ours + "down_proj.weight"),
    ]
