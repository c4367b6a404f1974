"""A decoder layer with grafts, its forward written out. One class per placement of norms; families name theirs."""

from functools import cache
from typing import Any

from torch import Tensor
from transformers import Cache

from surgeon.memory.graft import Graft
from surgeon.memory.pickled import Rebuilt, named_after
from surgeon.memory.reading import Reading


class PreNormLayer:
    """norm, attention, residual; norm, MLP, residual. Llama, Qwen2, Qwen3 and the decoders of Qwen-VL and InternVL."""

    parts = frozenset({"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
    """The submodules of a layer that computes this. One with more or fewer computes something else."""
    self_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any
    graft_sites: dict[str, str]

    def forward(
        self,
        hidden_states: Tensor,
        reading: Reading | None = None,
        position_ids: Tensor | None = None,
        compressed_positions: bool = False,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states [B, S, d]; reading: what the grafts read, None where no image has entered yet; the rest goes
        to self-attention -> [B, S, d]."""
        if not compressed_positions:
            # else flash attention would take ids that do not rise by one for several packed sequences; angles come
            # from position_embeddings
            kwargs["position_ids"] = position_ids
        for kind, graft in grafts_at(self, "before_layer"):
            if reading is not None:
                hidden_states = graft(hidden_states, reading, entry_name(self, kind))

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
        for kind, graft in grafts_at(self, "beside_mlp"):
            if reading is not None:
                hidden_states = graft(residual, reading, entry_name(self, kind), residual=hidden_states)
        return hidden_states


NORM_PLACEMENTS: dict[str, type[PreNormLayer]] = {"pre_norm": PreNormLayer}


def check_parts(layer: Any, norm_placement: str) -> None:
    """Raises ValueError where a decoder layer, its grafts aside, is not of the parts that this placement computes."""
    grafts = getattr(layer, "graft_sites", {})
    parts = {name for name, _ in layer.named_children() if name not in grafts}
    expected = NORM_PLACEMENTS[norm_placement].parts
    if parts != expected:
        apart = [f"has also {name}" for name in sorted(parts - expected)]
        apart += [f"lacks {name}" for name in sorted(expected - parts)]
        raise ValueError(f"a {type(layer).__name__} is no {norm_placement} layer: it {' and '.join(apart)}")


def add_graft(layer: Any, graft: Graft) -> None:
    """Graft a module into a layer, behind those that it has."""
    layer.add_module(graft.kind, graft)
    # by name: whatever wraps the module later (PEFT's modules_to_save, torch.compile, FSDP) is called in its place
    layer.graft_sites = {**layer.graft_sites, graft.kind: graft.site}


def grafts_at(layer: Any, site: str) -> list[tuple[str, Any]]:
    """Kind and module of the layer's grafts that are called at `site`, in the order in which they were grafted. A
    module is a `Graft`, or what wraps one; the layer of a plain model has none.

    Raises AttributeError where a graft has been taken out.
    """
    sites: dict[str, str] = getattr(layer, "graft_sites", {})
    return [(kind, getattr(layer, kind)) for kind, own in sites.items() if own == site]


def entry_name(layer: Any, kind: str) -> str:
    """The name in the visual memory of a layer's graft of this kind."""
    return f"{layer.self_attn.layer_idx}.{kind}"


@cache
def patched_layer_class(base: type, norm_placement: str) -> type:
    """`base` with the forward of this placement of norms. A subclass: isinstance, checkpointing and hooks of `base`
    still hold."""
    made_by = {"made_by": (patched_layer_class, (base, norm_placement))}
    return named_after(base, type(base.__name__, (Rebuilt, NORM_PLACEMENTS[norm_placement], base), made_by))
