"""CoMemo's mixin layer as one operator, and its memory projection as another."""

from exporters.operators._operator import empty_memory, like_hidden_states, operator
from surgeon.memory import mixin as memory

mixin = operator("mixin", memory.mixin, like_hidden_states)
mixin_memory = operator(
    "mixin_memory",
    memory.mixin_memory,
    lambda visual_embeds, cos, sin, norm, k_proj, v_proj, eps: empty_memory(
        visual_embeds, k_proj, head_dim=2 * cos.shape[-1]
    ),
)
