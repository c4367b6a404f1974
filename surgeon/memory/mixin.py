"""CoMemo's mixin layer: gated cross-attention to the visual tokens, in front of a decoder layer.

Source: "CoMemo: LVLMs Need Image Context with Image Memory", section 3, and the authors' implementation. The image
stays in the sequence as it was; this is a second way to it, which text that grows cannot dilute.
"""

from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.memory.graft import Graft, Layer, matrix, weight_of
from surgeon.memory.rms_norm import RMSNorm, rms_norm
from surgeon.memory.rotary import Rope, Rotary, rotate


def gated_cross_attention(
    hidden_states: Tensor,
    keys: Tensor,
    values: Tensor,
    memory_mask: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm: Layer,
    q_proj: Layer,
    o_proj: Layer,
    attn_gate: Tensor,
    ffn_norm: Layer,
    gate_proj: Layer,
    up_proj: Layer,
    down_proj: Layer,
    ff_gate: Tensor,
) -> Tensor:
    """What a mixin layer makes of the residual stream.

    hidden_states [B, S, d]. keys (already rotated) and values [B, H, M, hd], memory_mask bool [B, M] or [B, S, M]: the
    visual memory. cos, sin [B, S, hd / 2]: of the tokens' own positions. Gates are [1]. Returns [B, S, d] in
    hidden_states' dtype; a token with an empty memory keeps its value, feed-forward included.
    """
    query = q_proj(norm(hidden_states)).unflatten(-1, (-1, keys.shape[-1])).transpose(1, 2)
    query = rotate(query, (cos, sin))

    # A token without images has nothing to attend to: its softmax runs over padding, and the result is dropped below.
    mask = memory_mask if memory_mask.ndim == 3 else memory_mask[:, None]
    has_memory = mask.any(-1, keepdim=True)
    seen = (mask | ~has_memory)[:, None].expand(-1, 1, query.shape[2], -1)
    retrieved = F.scaled_dot_product_attention(query, keys, values, seen)
    retrieved = o_proj(retrieved.transpose(1, 2).flatten(2))

    attended = hidden_states + torch.tanh(attn_gate) * retrieved
    normed = ffn_norm(attended)
    fed = down_proj(F.silu(gate_proj(normed)) * up_proj(normed))
    return torch.where(has_memory, attended + torch.tanh(ff_gate) * fed, hidden_states)


def mixin(
    hidden_states: Tensor,
    keys: Tensor,
    values: Tensor,
    memory_mask: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm: Tensor,
    q_proj: Tensor,
    o_proj: Tensor,
    attn_gate: Tensor,
    ffn_norm: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    ff_gate: Tensor,
    eps: float,
) -> Tensor:
    """`gated_cross_attention` over weights alone, [out, in]; the reference implementation that every kernel must agree
    with."""
    return gated_cross_attention(
        hidden_states,
        keys,
        values,
        memory_mask,
        cos,
        sin,
        partial(rms_norm, weight=norm, eps=eps),
        matrix(q_proj),
        matrix(o_proj),
        attn_gate,
        partial(rms_norm, weight=ffn_norm, eps=eps),
        matrix(gate_proj),
        matrix(up_proj),
        matrix(down_proj),
        ff_gate,
    )


def memorise(
    visual_embeds: Tensor, cos: Tensor, sin: Tensor, norm: Layer, k_proj: Layer, v_proj: Layer
) -> tuple[Tensor, Tensor]:
    """The visual memory's keys, rotated, and values: visual_embeds [B, M, d], cos, sin [B, M, hd / 2]
    -> [B, H, M, hd] each."""
    normed = norm(visual_embeds)  # the same norm as the text's
    heads = (-1, 2 * cos.shape[-1])
    keys = k_proj(normed).unflatten(-1, heads).transpose(1, 2)
    values = v_proj(normed).unflatten(-1, heads).transpose(1, 2)
    return rotate(keys, (cos, sin)), values


def project(
    visual_embeds: Tensor, cos: Tensor, sin: Tensor, norm: Tensor, k_proj: Tensor, v_proj: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`memorise` over weights alone, [out, in]."""
    return memorise(visual_embeds, cos, sin, partial(rms_norm, weight=norm, eps=eps), matrix(k_proj), matrix(v_proj))


class Mixin(Graft):
    """The mixin layer in front of one decoder layer. Every head has keys and values of its own."""

    kind = "mixin"
    site = "before_layer"
    gates = ("attn_gate", "ff_gate")

    def __init__(self, hidden_size: int, num_heads: int, intermediate_size: int, rope: Rope, eps: float) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.rope, self.eps = num_heads, rope.head_dim, rope, eps
        width = num_heads * rope.head_dim
        self.norm = RMSNorm(hidden_size, eps)
        self.q_proj = nn.Linear(hidden_size, width, bias=False)
        self.k_proj = nn.Linear(hidden_size, width, bias=False)
        self.v_proj = nn.Linear(hidden_size, width, bias=False)
        self.o_proj = nn.Linear(width, hidden_size, bias=False)
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ffn_norm = RMSNorm(hidden_size, eps)
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.ff_gate = nn.Parameter(torch.zeros(1))

    @classmethod
    def from_config(cls, text_config: Any, options: dict[str, Any]) -> Self:
        return cls(
            hidden_size=text_config.hidden_size,
            num_heads=options["num_heads"],
            intermediate_size=options["intermediate"],
            rope=Rope(options["head_dim"], options["rope_theta"], options.get("rope_axes")),
            eps=options["eps"],
        )

    def project(self, visual_embeds: Tensor, rotary: Rotary | None = None) -> tuple[Tensor, Tensor]:
        assert rotary is not None
        return memorise(visual_embeds, *rotary, self.norm, self.k_proj, self.v_proj)

    def memory_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors that `project` takes after cos and sin, in its order."""
        return self.norm.weight, weight_of(self.k_proj), weight_of(self.v_proj)

    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The tensors that `mixin` takes after cos and sin, in its order."""
        return (
            self.norm.weight,
            weight_of(self.q_proj),
            weight_of(self.o_proj),
            self.attn_gate,
            self.ffn_norm.weight,
            weight_of(self.gate_proj),
            weight_of(self.up_proj),
            weight_of(self.down_proj),
            self.ff_gate,
        )

    def read(
        self,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        memory_mask: Tensor,
        visual_token_mask: Tensor | None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        assert rotary is not None
        return gated_cross_attention(
            hidden_states,
            keys,
            values,
            memory_mask,
            *rotary,
            self.norm,
            self.q_proj,
            self.o_proj,
            self.attn_gate,
            self.ffn_norm,
            self.gate_proj,
            self.up_proj,
            self.down_proj,
            self.ff_gate,
        )


GRAFT = Mixin
