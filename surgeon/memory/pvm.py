"""Persistent Visual Memory: a bottleneck branch beside the MLP that attends to the visual embeddings alone.

Source: "Persistent Visual Memory: Sustaining Perception for Deep Generation in LVLMs", section 4, and the authors'
implementation. Its attention is normalised over the visual tokens only, so text that grows cannot dilute it.
"""

from types import SimpleNamespace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.memory.graft import Graft
from surgeon.memory.reference import matrix, rms_norm_layer
from surgeon.memory.rms_norm import RMSNorm, rms_norm
from surgeon.memory.rotary import Rotary


def branch(
    weights: Any,
    hidden_states: Tensor,
    keys: Tensor,
    values: Tensor,
    memory_mask: Tensor,
    visual_token_mask: Tensor | None,
) -> Tensor:
    """The injection that a PVM branch adds to its layer's MLP.

    weights: the graft, or what has projections and norms of its names. hidden_states [B, S, d]: the residual stream
    after attention, not normalised. keys, values [B, Hm, M, hd] and memory_mask bool [B, M] or [B, S, M]: the visual
    memory. visual_token_mask bool [B, S] or None: tokens that get nothing. Returns [B, S, d] in hidden_states' dtype;
    tokens with an empty memory get exactly zero.
    """
    w = weights
    query = w.q_proj(w.input_norm(w.text_proj(hidden_states))).unflatten(-1, (-1, keys.shape[-1]))
    query = w.q_norm(query).transpose(1, 2)

    # A token without images has nothing to attend to: its softmax runs over padding, and the result is dropped below.
    mask = memory_mask if memory_mask.ndim == 3 else memory_mask[:, None]
    has_memory = mask.any(-1, keepdim=True)
    visible = (mask | ~has_memory)[:, None].expand(-1, 1, query.shape[2], -1)
    grouped = bool(query.shape[1] != keys.shape[1])  # a symbol under torch.compile
    retrieved = F.scaled_dot_product_attention(query, keys, values, visible, enable_gqa=grouped)
    retrieved = w.o_proj(retrieved.transpose(1, 2).flatten(2))

    normed = w.post_attention_norm(retrieved)
    retrieved = retrieved + w.down_proj(F.silu(w.gate_proj(normed)) * w.up_proj(normed))

    injection = w.alpha * rms_norm(w.output_proj(retrieved), None, w.eps)
    gets_memory = has_memory if visual_token_mask is None else has_memory & ~visual_token_mask[..., None]
    return injection * gets_memory


def persistent_visual_memory(
    hidden_states: Tensor,
    keys: Tensor,
    values: Tensor,
    memory_mask: Tensor,
    visual_token_mask: Tensor | None,
    text_proj: Tensor,
    input_norm: Tensor,
    q_proj: Tensor,
    q_norm: Tensor,
    o_proj: Tensor,
    post_attention_norm: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    output_proj: Tensor,
    alpha: Tensor,
    eps: float,
    residual: Tensor | None = None,
) -> Tensor:
    """`branch` of weights [out, in], norms [d] and alpha [1], added to `residual` [B, S, d] where that is given; the
    reference implementation that every kernel must agree with."""
    weights = SimpleNamespace(
        text_proj=matrix(text_proj),
        input_norm=rms_norm_layer(input_norm, eps),
        q_proj=matrix(q_proj),
        q_norm=rms_norm_layer(q_norm, eps),
        o_proj=matrix(o_proj),
        post_attention_norm=rms_norm_layer(post_attention_norm, eps),
        gate_proj=matrix(gate_proj),
        up_proj=matrix(up_proj),
        down_proj=matrix(down_proj),
        output_proj=matrix(output_proj),
        alpha=alpha,
        eps=eps,
    )
    injection = branch(weights, hidden_states, keys, values, memory_mask, visual_token_mask)
    return injection if residual is None else residual + injection


def keys_and_values(weights: Any, visual_embeds: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """The visual memory's: visual_embeds [B, M, d] -> [B, Hm, M, hd] each."""
    latent = weights.visual_proj(visual_embeds)
    heads = (-1, head_dim)
    keys = weights.k_norm(weights.k_proj(latent).unflatten(-1, heads)).transpose(1, 2)
    values = weights.v_proj(latent).unflatten(-1, heads).transpose(1, 2)
    return keys, values


def pvm_memory(
    visual_embeds: Tensor, visual_proj: Tensor, k_proj: Tensor, v_proj: Tensor, k_norm: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`keys_and_values` of weights [out, in] and a norm [hd], contiguous; the reference implementation."""
    weights = SimpleNamespace(
        visual_proj=matrix(visual_proj),
        k_proj=matrix(k_proj),
        v_proj=matrix(v_proj),
        k_norm=rms_norm_layer(k_norm, eps),
    )
    keys, values = keys_and_values(weights, visual_embeds, k_norm.shape[0])
    return keys.contiguous(), values.contiguous()


class PersistentVisualMemory(Graft):
    """The PVM branch of one decoder layer."""

    kind = "pvm"
    site = "beside_mlp"
    gates = ("alpha",)
    reference = staticmethod(persistent_visual_memory)
    memory_reference = staticmethod(pvm_memory)

    def __init__(
        self,
        hidden_size: int,
        latent_size: int,
        intermediate_size: int,
        head_dim: int,
        num_key_value_heads: int,
        eps: float,
    ) -> None:
        """`intermediate_size` is the branch's own SwiGLU width."""
        super().__init__()
        self.head_dim = head_dim
        self.num_key_value_heads = num_key_value_heads
        self.eps = eps
        kv_size = num_key_value_heads * head_dim
        self.text_proj = nn.Linear(hidden_size, latent_size, bias=False)
        self.visual_proj = nn.Linear(hidden_size, latent_size, bias=False)
        self.input_norm = RMSNorm(latent_size, eps)
        self.q_proj = nn.Linear(latent_size, latent_size, bias=False)
        self.k_proj = nn.Linear(latent_size, kv_size, bias=False)
        self.v_proj = nn.Linear(latent_size, kv_size, bias=False)
        self.o_proj = nn.Linear(latent_size, latent_size, bias=False)
        self.q_norm = RMSNorm(head_dim, eps)
        self.k_norm = RMSNorm(head_dim, eps)
        self.post_attention_norm = RMSNorm(latent_size, eps)
        self.gate_proj = nn.Linear(latent_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(latent_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, latent_size, bias=False)
        self.output_proj = nn.Linear(latent_size, hidden_size, bias=False)
        self.alpha = nn.Parameter(torch.zeros(1))

    @classmethod
    def from_config(cls, text_config: Any, options: dict[str, Any]) -> Self:
        latent = options["latent"]
        hidden = text_config.hidden_size
        heads, kv_heads = text_config.num_attention_heads, text_config.num_key_value_heads
        head_dim = getattr(text_config, "head_dim", None) or hidden // heads
        return cls(
            hidden_size=hidden,
            latent_size=latent,
            intermediate_size=int(latent * text_config.intermediate_size / hidden),
            head_dim=head_dim,
            num_key_value_heads=max(1, (latent // head_dim) // (heads // kv_heads)),
            eps=text_config.rms_norm_eps,
        )

    def project(self, visual_embeds: Tensor, rotary: Rotary | None = None) -> tuple[Tensor, Tensor]:
        return keys_and_values(self, visual_embeds, self.head_dim)

    def attend(
        self,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        memory_mask: Tensor,
        visual_token_mask: Tensor | None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        return branch(self, hidden_states, keys, values, memory_mask, visual_token_mask)


GRAFT = PersistentVisualMemory
