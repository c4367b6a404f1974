"""Persistent Visual Memory's branch as one operator, and its memory projection as another."""

from exporters.operators._operator import empty_memory, like_hidden_states, operator
from surgeon.memory import pvm

persistent_visual_memory = operator("persistent_visual_memory", pvm.persistent_visual_memory, like_hidden_states)
pvm_memory = operator(
    "pvm_memory",
    pvm.pvm_memory,
    lambda visual_embeds, visual_proj, k_proj, v_proj, k_norm, eps: empty_memory(
        visual_embeds, k_proj, head_dim=k_norm.shape[0]
    ),
)
