"""Graft Persistent Visual Memory branches beside the MLP of chosen decoder layers."""

from typing import TYPE_CHECKING, Any

from pydantic import Field

from passes._layers import LayerChoice, resolve_layers
from passes._visibility import Visibility, resolve_visibility, visibility_field
from surgeon.pipeline import Pass, PassOptions, PassResult, PostconditionError, PreconditionError

if TYPE_CHECKING:
    from surgeon.graph import LvlmGraph

KIND = "pvm"


class PvmOptions(PassOptions):
    layers: LayerChoice = Field(description="zero-based decoder layers: a list, every:N, or strided:N (N spread out)")
    latent: int = Field(default=512, gt=0, description="width of the branch; a multiple of the backbone's head_dim")
    visibility: Visibility | None = visibility_field()


class PvmPass(Pass):
    """Source: "Persistent Visual Memory", section 4; settings of section 5: layers 8, 16, 24 and latent 512."""

    name = "pvm"
    summary = "Persistent Visual Memory: a gated branch beside the MLP that attends to the pictures alone"
    Options = PvmOptions
    identity = True
    options: PvmOptions

    def requires(self, graph: "LvlmGraph") -> None:
        resolve_layers(self.options.layers, graph.num_hidden_layers, self.name)
        head_dim = graph.family.head_dim(graph.config)
        if self.options.latent % head_dim:
            below = self.options.latent // head_dim * head_dim
            usable = f"{below} or {below + head_dim}" if below else f"{head_dim}"
            raise PreconditionError(
                f"pass pvm: latent={self.options.latent} is not divisible by the backbone's head_dim {head_dim}; "
                f"use {usable}"
            )
        grafted = [entry["layers"] for entry in graph.record["grafts"] if entry["kind"] == KIND]
        if grafted:
            raise PreconditionError(
                f"pass pvm is already applied, at layers {', '.join(map(str, grafted[0]))}; "
                "patch the unpatched checkpoint"
            )
        resolve_visibility(self.options.visibility, graph, self.name)

    def resolved(self, graph: "LvlmGraph") -> dict[str, Any]:
        layers = resolve_layers(self.options.layers, graph.num_hidden_layers, self.name)
        visibility = resolve_visibility(self.options.visibility, graph, self.name)
        return {"layers": layers, "latent": self.options.latent, "visibility": visibility}

    def rewrite(self, graph: "LvlmGraph") -> PassResult:
        options = self.resolved(graph)
        touched = graph.graft(KIND, options.pop("layers"), options)
        return PassResult(modified=True, touched=touched)

    def ensures(self, graph: "LvlmGraph", result: PassResult) -> None:
        layers = resolve_layers(self.options.layers, graph.num_hidden_layers, self.name)
        expected = [f"{graph.family.text_model}.layers.{i}.{KIND}" for i in layers]
        if sorted(result.touched) != sorted(expected):
            raise PostconditionError(f"pass pvm was to add {expected} and added {result.touched}")


PASS = PvmPass
