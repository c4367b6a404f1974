"""Graft Persistent Visual Memory branches beside the MLP of chosen decoder layers."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from surgeon.graft_pass import MOST, GraftOptions, GraftPass, Visibility
from surgeon.pipeline import PreconditionError, make_pass

if TYPE_CHECKING:
    from surgeon.graph import LvlmGraph

_PUBLISHED_FORM: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("attention_bias", (False,), "the branch's projections have no bias"),
    ("mlp_bias", (False,), "the branch's projections have no bias"),
    ("hidden_act", ("silu", "swish"), "the branch's MLP is SwiGLU"),
    ("attention_dropout", (0.0,), "the branch's attention has no dropout"),
)
"""Keys of a text config, the values that the branch is defined for, and what it does whatever they say."""


class PvmOptions(GraftOptions):
    latent: int = Field(
        default=512, gt=0, le=MOST, description="width of the branch; a multiple of the backbone's head_dim"
    )


class PvmPass(GraftPass):
    """Source: "Persistent Visual Memory", section 4; settings of section 5: layers 8, 16, 24 and latent 512."""

    name = kind = "pvm"
    summary = "a gated branch beside the MLP that attends to the images alone"
    Options = PvmOptions
    options: PvmOptions

    def check_backbone(self, graph: "LvlmGraph") -> None:
        self._require_published_form(graph)
        self._require_heads_that_divide(graph)

    def graft_options(self, graph: "LvlmGraph") -> dict[str, Any]:
        return {"latent": self.options.latent}

    def _require_published_form(self, graph: "LvlmGraph") -> None:
        """The branch is a small block of the backbone's kind, and of what a config may ask for it has no more than the
        published one. Biases that a family has by construction, as Qwen2.5-VL's, are not asked for by its config."""
        text = graph.family.text_config(graph.config)
        for key, supported, instead in _PUBLISHED_FORM:
            value = getattr(text, key, None)
            if value is not None and value not in supported:
                raise PreconditionError(
                    f"pass pvm: the backbone's config has {key}={value!r}, and {instead}; PVM is defined for "
                    f"{key}={supported[0]!r} only: graft into a checkpoint that has that"
                )

    def _require_heads_that_divide(self, graph: "LvlmGraph") -> None:
        latent, head_dim = self.options.latent, graph.family.head_dim(graph.config)
        if latent % head_dim == 0 and self._heads_divide(graph, latent):
            return
        usable = " or ".join(map(str, self._nearest_latents(graph, head_dim)))
        if latent % head_dim:
            raise PreconditionError(
                f"pass pvm: latent={latent} is not divisible by the backbone's head_dim {head_dim}; use {usable}"
            )
        query_heads, key_value_heads = self._heads(graph, latent)
        raise PreconditionError(
            f"pass pvm: latent={latent} makes {query_heads} query heads of {head_dim}, which {key_value_heads} "
            f"key/value heads cannot share evenly; use {usable}"
        )

    def _heads(self, graph: "LvlmGraph", latent: int) -> tuple[int, int]:
        """Query and key/value heads of a branch of this width, as the graft itself counts them."""
        import torch

        from surgeon.memory.pvm import PersistentVisualMemory

        with torch.device("meta"):
            branch = PersistentVisualMemory.from_config(graph.family.text_config(graph.config), {"latent": latent})
        return latent // branch.head_dim, branch.num_key_value_heads

    def _heads_divide(self, graph: "LvlmGraph", latent: int) -> bool:
        query_heads, key_value_heads = self._heads(graph, latent)
        return query_heads % key_value_heads == 0

    def _nearest_latents(self, graph: "LvlmGraph", head_dim: int) -> list[int]:
        """The nearest widths below, where there is one, and above the option's that work."""
        below = (self.options.latent - 1) // head_dim * head_dim
        lower = (width for width in range(below, 0, -head_dim) if self._heads_divide(graph, width))
        # ends: query heads that are a multiple of the backbone's for each key/value head always divide
        higher = (width for width in itertools.count(below + head_dim, head_dim) if self._heads_divide(graph, width))
        return [*itertools.islice(lower, 1), next(higher)]


PASS = PvmPass


def PVM(layers: Sequence[int] | str, latent: int = 512, visibility: Visibility | None = None) -> PvmPass:
    """The pass `pvm`, for `surgeon.graft`; options as `surgeon passes` lists them. Raises OptionError."""
    options = {"layers": layers, "latent": latent, "visibility": visibility}
    return make_pass({PvmPass.name: PvmPass}, PvmPass.name, options)  # type: ignore[return-value]
