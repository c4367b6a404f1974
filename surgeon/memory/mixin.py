"""CoMemo's mixin layer: gated cross-attention to the visual tokens, in front of a decoder layer.

Source: "CoMemo: LVLMs Need Image Context with Image Memory", section 3, and the authors' implementation. The image
stays in the sequence as it was; this is a second way to it, which text that grows cannot dilute.
"""

from types import SimpleNamespace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.memory.graft import Graft
from surgeon.memory.reference import matrix, rms_norm_layer
from surgeon.memory.rms_norm import RMSNorm
from surgeon.memory.rotary import Rope, Rotary, rotate


def gated_cross_attention(
    weights: Any, hidden_states: Tensor, keys: Tensor, values: Tensor, memory_mask: Tensor, rotary: Rotary
) -> Tensor:
    """What a mixin layer makes of the residual stream.

    weights: the graft, or what has projections, norms and gates [1] of its names. hidden_states [B, S, d]. keys
    (already rotated) and values [B, H, M, hd], memory_mask bool [B, M] or [B, S, M]: the visual memory. rotary: cos,
    sin [B, S, hd / 2] of the tokens' own positions. Returns [B, S, d] in hidden_states' dtype; a token with an empty
    memory keeps its value, feed-forward included.
    """
    w = weights
    query = w.q_proj(w.norm(hidden_states)).unflatten(-1, (-1, keys.shape[-1])).transpose(1, 2)
    query = rotate(query, rotary)

    # A token without images has nothing to attend to: its softmax runs over padding, and the result is dropped below.
    mask = memory_mask if memory_mask.ndim == 3 else memory_mask[:, None]
    has_memory = mask.any(-1, keepdim=True)
    visible = (mask | ~has_memory)[:, None].expand(-1, 1, query.shape[2], -1)
    retrieved = F.scaled_dot_product_attention(query, keys, values, visible)
    retrieved = w.o_proj(retrieved.transpose(1, 2).flatten(2))

    attended = hidden_states + torch.tanh(w.attn_gate) * retrieved
    normed = w.ffn_norm(attended)
    fed = w.down_proj(F.silu(w.gate_proj(normed)) * w.up_proj(normed))
    return torch.where(has_memory, attended + torch.tanh(w.ff_gate) * fed, hidden_states)


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
    """`gated_cross_attention` of weights [out, in] and norms [d], contiguous; the reference implementation that every
    kernel must agree with."""
    weights = SimpleNamespace(
        norm=rms_norm_layer(norm, eps),
        q_proj=matrix(q_proj),
        o_proj=matrix(o_proj),
        attn_gate=attn_gate,
        ffn_norm=rms_norm_layer(ffn_norm, eps),
        gate_proj=matrix(gate_proj),
        up_proj=matrix(up_proj),
        down_proj=matrix(down_proj),
        ff_gate=ff_gate,
    )
    return gated_cross_attention(weights, hidden_states, keys, values, memory_mask, (cos, sin)).contiguous()


def keys_and_values(weights: Any, visual_embeds: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """The visual memory's keys, rotated, and values: visual_embeds [B, M, d], cos, sin [B, M, hd / 2]
    -> [B, H, M, hd] each."""
    normed = weights.norm(visual_embeds)  # the same norm as the text's
    heads = (-1, 2 * rotary[0].shape[-1])
    keys = weights.k_proj(normed).unflatten(-1, heads).transpose(1, 2)
    values = weights.v_proj(normed).unflatten(-1, heads).transpose(1, 2)
    return rotate(keys, rotary), values


def mixin_memory(
    visual_embeds: Tensor, cos: Tensor, sin: Tensor, norm: Tensor, k_proj: Tensor, v_proj: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`keys_and_values` of weights [out, in] and a norm [d], contiguous; the reference implementation."""
    weights = SimpleNamespace(norm=rms_norm_layer(norm, eps), k_proj=matrix(k_proj), v_proj=matrix(v_proj))
    keys, values = keys_and_values(weights, visual_embeds, (cos, sin))
    return keys.contiguous(), values.contiguous()


class Mixin(Graft):
    """The mixin layer in front of one decoder layer. Every head has keys and values of its own."""

    kind = "mixin"
    site = "before_layer"
    gates = ("attn_gate", "ff_gate")
    reference = staticmethod(mixin)
    memory_reference = staticmethod(mixin_memory)

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
        return keys_and_values(self, visual_embeds, rotary)

    def attend(
        self,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        memory_mask: Tensor,
        visual_token_mask: Tensor | None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        assert rotary is not None
        return gated_cross_attention(self, hidden_states, keys, values, memory_mask, rotary)


GRAFT = Mixin
