"""Graft CoMemo's mixin layers, gated cross-attention to the images, in front of chosen decoder layers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from surgeon.graft_pass import LAYERS, MOST, GraftOptions, GraftPass, Visibility
from surgeon.layer_choice import LayerChoice
from surgeon.pipeline import PassResult, PreconditionError, make_pass

if TYPE_CHECKING:
    from surgeon.graph import LvlmGraph


class MixinOptions(GraftOptions):
    layers: LayerChoice = Field(default="every:4", description=LAYERS)
    every: int | None = Field(default=None, gt=0, description="short for layers=every:N")
    num_heads: int | None = Field(default=None, gt=0, le=MOST, description="attention heads; by default the backbone's")
    head_dim: int | None = Field(default=None, gt=0, le=MOST, description="width of a head; by default the backbone's")
    intermediate: int | None = Field(
        default=None, gt=0, le=MOST, description="feed-forward width; by default the backbone's"
    )
    rope_theta: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="rotary base; by default the backbone's"
    )
    eps: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="of its norms; by default the backbone's"
    )
    tiles: Literal["both", "context", "memory"] = Field(
        default="both", description="where high-resolution tiles go beside the thumbnail: both, context, or memory"
    )

    @model_validator(mode="after")
    def _one_choice(self) -> "MixinOptions":
        if self.every is not None and "layers" in self.model_fields_set:
            raise ValueError("pass layers or every, not both")
        return self


class MixinPass(GraftPass):
    """Source: "CoMemo: LVLMs Need Image Context with Image Memory", section 3; published with every=4."""

    name = kind = "mixin"
    summary = "CoMemo's gated cross-attention to the images, before every N-th layer"
    Options = MixinOptions
    options: MixinOptions

    def layer_choice(self) -> list[int] | str:
        return self.options.layers if self.options.every is None else f"every:{self.options.every}"

    def check_backbone(self, graph: "LvlmGraph") -> None:
        own, backbone = self.options.head_dim, graph.family.head_dim(graph.config)
        if own is not None and own % 2:
            raise PreconditionError(f"pass mixin: head_dim={own} is odd; rotary positions need an even one")
        if own not in (None, backbone) and self._axes(graph) is not None:
            raise PreconditionError(
                f"pass mixin: head_dim={own}, but {graph.family.model_type} turns heads of {backbone} with several "
                f"position axes; leave head_dim out"
            )
        if self.options.tiles != "both" and graph.family.tile_layout(graph.config) is None:
            raise PreconditionError(
                f"pass mixin: tiles={self.options.tiles}, but family {graph.family.model_type} does not cut images "
                "into tiles; use tiles=both"
            )

    def graft_options(self, graph: "LvlmGraph") -> dict[str, Any]:
        text = graph.family.text_config(graph.config)
        options = self.options

        def own(value: Any, backbone: Any) -> Any:
            return backbone if value is None else value

        return {
            "num_heads": own(options.num_heads, text.num_attention_heads),
            "head_dim": own(options.head_dim, graph.family.head_dim(graph.config)),
            "intermediate": own(options.intermediate, text.intermediate_size),
            "rope_theta": float(own(options.rope_theta, text.rope_parameters["rope_theta"])),
            "eps": own(options.eps, text.rms_norm_eps),
        }

    def resolved(self, graph: "LvlmGraph") -> dict[str, Any]:
        return {**super().resolved(graph), "tiles": self.options.tiles}

    def recorded(self, graph: "LvlmGraph") -> dict[str, Any]:
        axes = self._axes(graph)
        return super().recorded(graph) | ({} if axes is None else {"rope_axes": axes})

    def rewrite(self, graph: "LvlmGraph") -> PassResult:
        result = super().rewrite(graph)
        if self.options.tiles != "both":
            graph.lay_out_tiles(allocation=self.options.tiles)
        return result

    def _axes(self, graph: "LvlmGraph") -> list[int] | None:
        """Which position axis each rotary frequency turns with; None where there is one."""
        axes = list(graph.family.rope_axes(graph.config))
        return axes if any(axes) else None


PASS = MixinPass


def Mixin(
    layers: Sequence[int] | str = "every:4",
    *,
    num_heads: int | None = None,
    head_dim: int | None = None,
    intermediate: int | None = None,
    rope_theta: float | None = None,
    eps: float | None = None,
    tiles: Literal["both", "context", "memory"] = "both",
    visibility: Visibility | None = None,
) -> MixinPass:
    """The pass `mixin`, for `surgeon.graft`; options as `surgeon passes` lists them. Raises OptionError."""
    options = {
        "layers": layers,
        "num_heads": num_heads,
        "head_dim": head_dim,
        "intermediate": intermediate,
        "rope_theta": rope_theta,
        "eps": eps,
        "tiles": tiles,
        "visibility": visibility,
    }
    return make_pass({MixinPass.name: MixinPass}, MixinPass.name, options)  # type: ignore[return-value]
