"""A decoder layer with grafts, its forward written out. One class per shape of layer; families name theirs."""

from functools import cache
from typing import Any

from torch import Tensor
from transformers import Cache

from surgeon.memory.graft import Graft
from surgeon.memory.visual_memory import VisualMemory


class PreNormLayer:
    """norm, attention, residual; norm, MLP, residual. Llama, Qwen2, Qwen3 and the decoders of Qwen-VL and InternVL."""

    self_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any

    def forward(
        self,
        hidden_states: Tensor,
        visual_memory: VisualMemory | None = None,
        visual_token_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states [B, S, d]; visual_token_mask bool [B, S]; the rest goes to self-attention -> [B, S, d]."""
        memory = (visual_memory, visual_token_mask)
        for graft in grafts_at(self, "before_layer"):
            replaced = read(graft, self, hidden_states, *memory)
            hidden_states = hidden_states if replaced is None else replaced

        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(
            hidden_states=hidden_states, past_key_values=past_key_values, use_cache=use_cache, **kwargs
        )
        hidden_states = residual + hidden_states

        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = self.mlp(hidden_states)
        hidden_states = residual + hidden_states
        for graft in grafts_at(self, "beside_mlp"):
            injection = read(graft, self, residual, *memory)
            hidden_states = hidden_states if injection is None else hidden_states + injection
        return hidden_states


SHAPES: dict[str, type] = {"pre_norm": PreNormLayer}


def grafts_at(layer: Any, site: str) -> list[Graft]:
    """The layer's grafts that are called at `site`, in the order in which they were grafted."""
    return [child for child in layer.children() if isinstance(child, Graft) and child.site == site]


def entry_name(layer: Any, graft: Graft) -> str:
    """The graft's name in the visual memory."""
    return f"{layer.self_attn.layer_idx}.{graft.kind}"


def read(
    graft: Graft,
    layer: Any,
    hidden_states: Tensor,
    memory: VisualMemory | None,
    visual_token_mask: Tensor | None,
) -> Tensor | None:
    """What the graft computes; None where no picture has entered yet."""
    if memory is None or memory.mask is None:
        return None
    keys, values = memory.entries[entry_name(layer, graft)]
    output: Tensor = graft(hidden_states, keys, values, memory.mask, visual_token_mask)
    return output


@cache
def patched_layer_class(base: type, shape: str) -> type:
    """`base` with the forward of this shape. A subclass: isinstance, checkpointing and hooks of `base` still hold."""
    return type(f"Patched{base.__name__}", (SHAPES[shape], base), {"__module__": __name__})
