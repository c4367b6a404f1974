"""CoMemo's mixin layer in fused launches: five to read the memory, two to fill it."""

from functools import cache

from exporters.kernels import attend, linear, retrieve, swiglu, write_memory
from exporters.kernels.kernel import Chain, Chains, Step
from surgeon.memory.mixin import mixin, mixin_memory
from surgeon.memory.reference import tensor_names


@cache
def chain(eps: float) -> Chain:
    """`surgeon.memory.mixin.mixin`, arguments in its order."""
    return Chain(
        name="mixin",
        inputs=tensor_names(mixin),
        steps=(
            Step(
                "mixin_query",
                linear.KERNEL,
                {"x": "hidden_states", "norm": "norm", "weight": "q_proj"},
                {"y": "query"},
                {"eps": eps},
            ),
            Step(
                "mixin_attend",
                attend.KERNEL,
                {"x": "query", "cos": "cos", "sin": "sin", "keys": "keys", "values": "values", "mask": "memory_mask"},
                {"acc": "acc", "ml": "ml", "arrived": "arrived"},
            ),
            Step(
                "mixin_retrieve",
                retrieve.KERNEL,
                {"acc": "acc", "ml": "ml", "weight": "o_proj", "residual": "hidden_states", "gate": "attn_gate"},
                {"y": "attended"},
            ),
            Step(
                "mixin_swiglu",
                swiglu.KERNEL,
                {"x": "attended", "norm": "ffn_norm", "gate_weight": "gate_proj", "up_weight": "up_proj"},
                {"y": "fed"},
                {"eps": eps},
            ),
            Step(
                "mixin_down",
                linear.KERNEL,
                {"x": "fed", "weight": "down_proj", "residual": "attended", "gate": "ff_gate", "ml": "ml"},
                {"y": "output"},
                {"rounded": True},
            ),
        ),
        outputs=("output",),
    )  # fmt: skip


@cache
def memory_chain(eps: float, head_dim: int) -> Chain:
    """`Mixin.project`: visual embeddings [B, M, d] and the angles of their positions -> keys, values [B, H, M, hd]."""
    options = {"eps": eps, "head_dim": head_dim, "rounded": True}
    return Chain(
        name="mixin_memory",
        inputs=tensor_names(mixin_memory),
        steps=(
            Step(
                "mixin_keys",
                write_memory.KERNEL,
                {"x": "visual_embeds", "norm": "norm", "weight": "k_proj", "cos": "cos", "sin": "sin"},
                {"y": "keys"},
                options,
            ),
            Step(
                "mixin_values",
                write_memory.KERNEL,
                {"x": "visual_embeds", "norm": "norm", "weight": "v_proj"},
                {"y": "values"},
                options,
            ),
        ),
        outputs=("keys", "values"),
    )


CHAINS = Chains(attend=chain, write_memory=memory_chain)
