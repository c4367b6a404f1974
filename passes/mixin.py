"""Graft CoMemo's mixin layers, gated cross-attention to the pictures, in front of chosen decoder layers."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from passes._layers import LayerChoice, resolve_layers
from passes._visibility import Visibility, resolve_visibility, visibility_field
from surgeon.pipeline import Pass, PassOptions, PassResult, PostconditionError, PreconditionError

if TYPE_CHECKING:
    from surgeon.graph import LvlmGraph

KIND = "mixin"


class MixinOptions(PassOptions):
    layers: LayerChoice = Field(
        default="every:4", description="zero-based decoder layers: a list, every:N, or strided:N (N spread out)"
    )
    every: int | None = Field(default=None, gt=0, description="short for layers=every:N")
    num_heads: int | None = Field(default=None, gt=0, description="attention heads; by default the backbone's")
    head_dim: int | None = Field(default=None, gt=0, description="width of a head; by default the backbone's")
    intermediate: int | None = Field(default=None, gt=0, description="feed-forward width; by default the backbone's")
    rope_theta: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="rotary base; by default the backbone's"
    )
    eps: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="of its norms; by default the backbone's"
    )
    tiles: Literal["both", "context", "memory"] = Field(
        default="both", description="where high-resolution tiles go beside the thumbnail: both, context, or memory"
    )
    visibility: Visibility | None = visibility_field()

    @model_validator(mode="after")
    def _one_choice(self) -> "MixinOptions":
        if self.every is not None and "layers" in self.model_fields_set:
            raise ValueError("give layers or every, not both")
        return self


class MixinPass(Pass):
    """Source: "CoMemo: LVLMs Need Image Context with Image Memory", section 3; published with every=4."""

    name = "mixin"
    summary = "CoMemo's memory path: gated cross-attention to the pictures in front of every N-th layer"
    Options = MixinOptions
    identity = True
    options: MixinOptions

    def requires(self, graph: "LvlmGraph") -> None:
        self._layers(graph)
        grafted = [entry["layers"] for entry in graph.record["grafts"] if entry["kind"] == KIND]
        if grafted:
            raise PreconditionError(
                f"pass mixin is already applied, at layers {', '.join(map(str, grafted[0]))}; "
                "patch the unpatched checkpoint"
            )
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
                f"pass mixin: tiles={self.options.tiles}, but family {graph.family.model_type} does not cut pictures "
                "into tiles; use tiles=both"
            )

    def resolved(self, graph: "LvlmGraph") -> dict[str, Any]:
        text = graph.family.text_config(graph.config)
        chosen = self.options

        def own(value: Any, backbone: Any) -> Any:
            return backbone if value is None else value

        return {
            "layers": self._layers(graph),
            "num_heads": own(chosen.num_heads, text.num_attention_heads),
            "head_dim": own(chosen.head_dim, graph.family.head_dim(graph.config)),
            "intermediate": own(chosen.intermediate, text.intermediate_size),
            "rope_theta": float(own(chosen.rope_theta, text.rope_parameters["rope_theta"])),
            "eps": own(chosen.eps, text.rms_norm_eps),
            "tiles": chosen.tiles,
            "visibility": resolve_visibility(chosen.visibility, graph, self.name),
        }

    def rewrite(self, graph: "LvlmGraph") -> PassResult:
        options = self.resolved(graph)
        layers, tiles = options.pop("layers"), options.pop("tiles")
        axes = self._axes(graph)
        touched = graph.graft(KIND, layers, options if axes is None else {**options, "rope_axes": axes})
        if tiles != "both":
            graph.lay_out_tiles(allocation=tiles)
        return PassResult(modified=True, touched=touched)

    def ensures(self, graph: "LvlmGraph", result: PassResult) -> None:
        expected = [f"{graph.family.text_model}.layers.{i}.{KIND}" for i in self._layers(graph)]
        if sorted(result.touched) != sorted(expected):
            raise PostconditionError(f"pass mixin was to add {expected} and added {result.touched}")

    def _layers(self, graph: "LvlmGraph") -> list[int]:
        choice = self.options.layers if self.options.every is None else f"every:{self.options.every}"
        return resolve_layers(choice, graph.num_hidden_layers, self.name)

    def _axes(self, graph: "LvlmGraph") -> list[int] | None:
        """Which position axis each rotary frequency turns with; None where there is one."""
        axes = list(graph.family.rope_axes(graph.config))
        return axes if any(axes) else None


PASS = MixinPass
