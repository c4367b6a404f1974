"""Persistent Visual Memory: a bottleneck branch beside the MLP that attends to the visual embeddings alone.

Source: "Persistent Visual Memory: Sustaining Perception for Deep Generation in LVLMs", section 4, and the authors'
implementation. Its attention is normalised over the visual tokens only, so text that grows cannot dilute it.
"""

from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.memory.graft import Graft, Layer, matrix, weight_of
from surgeon.memory.rms_norm import RMSNorm, rms_norm
from surgeon.memory.rotary import Rotary


def branch(
    hidden_states: Tensor,
    keys: Tensor,
    values: Tensor,
    memory_mask: Tensor,
    visual_token_mask: Tensor | None,
    text_proj: Layer,
    input_norm: Layer,
    q_proj: Layer,
    q_norm: Layer,
    o_proj: Layer,
    post_attention_norm: Layer,
    gate_proj: Layer,
    up_proj: Layer,
    down_proj: Layer,
    output_proj: Layer,
    alpha: Tensor,
    eps: float,
) -> Tensor:
    """The injection that a PVM branch adds to its layer's MLP.

    hidden_states [B, S, d]: the residual stream after attention, not normalised. keys, values [B, Hm, M, hd] and
    memory_mask bool [B, M] or [B, S, M]: the visual memory. visual_token_mask bool [B, S] or None: tokens that get
    nothing. alpha [1]. Returns [B, S, d] in hidden_states' dtype; tokens with an empty memory get exactly zero.
    """
    query = q_proj(input_norm(text_proj(hidden_states))).unflatten(-1, (-1, keys.shape[-1]))
    query = q_norm(query).transpose(1, 2)

    # A token without images has nothing to attend to: its softmax runs over padding, and the result is dropped below.
    mask = memory_mask if memory_mask.ndim == 3 else memory_mask[:, None]
    has_memory = mask.any(-1, keepdim=True)
    seen = (mask | ~has_memory)[:, None].expand(-1, 1, query.shape[2], -1)
    grouped = bool(query.shape[1] != keys.shape[1])  # a symbol under torch.compile
    retrieved = F.scaled_dot_product_attention(query, keys, values, seen, enable_gqa=grouped)
    retrieved = o_proj(retrieved.transpose(1, 2).flatten(2))

    normed = post_attention_norm(retrieved)
    retrieved = retrieved + down_proj(F.silu(gate_proj(normed)) * up_proj(normed))

    injection = alpha * rms_norm(output_proj(retrieved), None, eps)
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
) -> Tensor:
    """`branch` over weights alone, [out, in]; the reference implementation that every kernel must agree with."""

    def norm(weight: Tensor) -> Layer:
        return partial(rms_norm, weight=weight, eps=eps)

    return branch(
        hidden_states,
        keys,
        values,
        memory_mask,
        visual_token_mask,
        matrix(text_proj),
        norm(input_norm),
        matrix(q_proj),
        norm(q_norm),
        matrix(o_proj),
        norm(post_attention_norm),
        matrix(gate_proj),
        matrix(up_proj),
        matrix(down_proj),
        matrix(output_proj),
        alpha,
        eps,
    )


def memorise(
    visual_embeds: Tensor, visual_proj: Layer, k_proj: Layer, v_proj: Layer, k_norm: Layer, head_dim: int
) -> tuple[Tensor, Tensor]:
    """The visual memory's keys and values: visual_embeds [B, M, d] -> [B, Hm, M, hd] each."""
    latent = visual_proj(visual_embeds)
    heads = (-1, head_dim)
    keys = k_norm(k_proj(latent).unflatten(-1, heads)).transpose(1, 2)
    values = v_proj(latent).unflatten(-1, heads).transpose(1, 2)
    return keys, values


def project(
    visual_embeds: Tensor, visual_proj: Tensor, k_proj: Tensor, v_proj: Tensor, k_norm: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`memorise` over weights alone, [out, in]."""
    norm = partial(rms_norm, weight=k_norm, eps=eps)
    return memorise(visual_embeds, matrix(visual_proj), matrix(k_proj), matrix(v_proj), norm, k_norm.shape[0])


class PersistentVisualMemory(Graft):
    """The PVM branch of one decoder layer."""

    kind = "pvm"
    site = "beside_mlp"
    gates = ("alpha",)

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
        return memorise(visual_embeds, self.visual_proj, self.k_proj, self.v_proj, self.k_norm, self.head_dim)

    def memory_weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The tensors that `project` takes, in its order."""
        return weight_of(self.visual_proj), weight_of(self.k_proj), weight_of(self.v_proj), self.k_norm.weight

    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The tensors that `persistent_visual_memory` takes after the masks, in its order."""
        return (
            weight_of(self.text_proj),
            self.input_norm.weight,
            weight_of(self.q_proj),
            self.q_norm.weight,
            weight_of(self.o_proj),
            self.post_attention_norm.weight,
            weight_of(self.gate_proj),
            weight_of(self.up_proj),
            weight_of(self.down_proj),
            weight_of(self.output_proj),
            self.alpha,
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
        return branch(
            hidden_states,
            keys,
            values,
            memory_mask,
            visual_token_mask,
            self.text_proj,
            self.input_norm,
            self.q_proj,
            self.q_norm,
            self.o_proj,
            self.post_attention_norm,
            self.gate_proj,
            self.up_proj,
            self.down_proj,
            self.output_proj,
            self.alpha,
            self.eps,
        )


GRAFT = PersistentVisualMemory
