"""Persistent Visual Memory in fused launches: six to read it, three to fill it.

Six, because each reads the whole row that the one before it wrote: the projection of the token; its attention, split
over slots; the output projection; the two halves of the feed-forward; the injection.
"""

from functools import cache

from exporters.kernels import attend, inject, linear, retrieve, swiglu, write_memory
from exporters.kernels.kernel import Chain, Chains, Step
from surgeon.memory.pvm import persistent_visual_memory, pvm_memory
from surgeon.memory.reference import tensor_names


@cache
def chain(eps: float) -> Chain:
    """`surgeon.memory.pvm.persistent_visual_memory`, arguments in its order."""
    return Chain(
        name="pvm",
        inputs=tensor_names(persistent_visual_memory),
        steps=(
            Step("pvm_text", linear.KERNEL, {"x": "hidden_states", "weight": "text_proj"}, {"y": "latent"}),
            Step(
                "pvm_attend",
                attend.KERNEL,
                {
                    "x": "latent", "norm": "input_norm", "q_weight": "q_proj", "q_norm": "q_norm",
                    "keys": "keys", "values": "values", "mask": "memory_mask",
                },
                {"acc": "acc", "ml": "ml", "arrived": "arrived"},
                {"eps": eps},
            ),
            Step("pvm_retrieve", retrieve.KERNEL, {"acc": "acc", "ml": "ml", "weight": "o_proj"}, {"y": "retrieved"}),
            Step(
                "pvm_swiglu",
                swiglu.KERNEL,
                {"x": "retrieved", "norm": "post_attention_norm", "gate_weight": "gate_proj", "up_weight": "up_proj"},
                {"y": "fed"},
                {"eps": eps},
            ),
            Step(
                "pvm_down",
                linear.KERNEL,
                {"x": "fed", "weight": "down_proj", "residual": "retrieved"},
                {"y": "refined"},
            ),
            Step(
                "pvm_inject",
                inject.KERNEL,
                {
                    "x": "refined", "weight": "output_proj", "alpha": "alpha", "ml": "ml",
                    "visual_mask": "visual_token_mask", "residual": "residual", "arrived": "arrived",
                },
                {"y": "injection", "raw": "raw"},
                {"eps": eps, "rounded": True},
            ),
        ),
        outputs=("injection",),
    )  # fmt: skip


@cache
def memory_chain(eps: float, head_dim: int) -> Chain:
    """`PersistentVisualMemory.project`: visual embeddings [B, M, d] -> keys, values [B, Hm, M, hd]."""
    options = {"head_dim": head_dim, "rounded": True}
    return Chain(
        name="pvm_memory",
        inputs=tensor_names(pvm_memory),
        steps=(
            Step("pvm_visual", linear.KERNEL, {"x": "visual_embeds", "weight": "visual_proj"}, {"y": "latent"}),
            Step(
                "pvm_keys",
                write_memory.KERNEL,
                {"x": "latent", "weight": "k_proj", "head_norm": "k_norm"},
                {"y": "keys"},
                {"eps": eps, **options},
            ),
            Step("pvm_values", write_memory.KERNEL, {"x": "latent", "weight": "v_proj"}, {"y": "values"}, options),
        ),
        outputs=("keys", "values"),
    )


CHAINS = Chains(attend=chain, write_memory=memory_chain)
