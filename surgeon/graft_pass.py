"""Passes that graft: which layers, who sees an image, and that what was to be added was added."""

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from surgeon.layer_choice import LayerChoice, resolve_layers
from surgeon.pipeline import Pass, PassOptions, PassResult, PostconditionError, PreconditionError

if TYPE_CHECKING:
    from surgeon.graph import LvlmGraph

Visibility = Literal["causal", "all"]
MOST = 1 << 24
"""A width or a number of heads: what is larger is a slip of the pen."""
LAYERS = "zero-based decoder layers: a list, every:N, or strided:N (N spread out)"


class GraftOptions(PassOptions):
    """What every graft may be asked for. A pass adds its own, or gives `layers` a default."""

    layers: LayerChoice = Field(description=LAYERS)
    visibility: Visibility | None = Field(
        default=None,
        description="which tokens see an image in the memory: causal (those behind it) or all (as published); by "
        "default that of the checkpoint's other grafts, else causal",
    )


class GraftPass(Pass):
    """A pass that grafts a module of one kind into decoder layers. It says its kind, its options, what the graft needs
    of a backbone (`check_backbone`) and what the record holds of it (`graft_options`)."""

    kind: ClassVar[str]
    """The graft's: its class is the `GRAFT` of the file of that name."""
    identity = True
    options: GraftOptions

    def check_backbone(self, graph: "LvlmGraph") -> None:
        """Raise PreconditionError for a backbone that the graft, with these options, is not defined for."""

    @abstractmethod
    def graft_options(self, graph: "LvlmGraph") -> dict[str, Any]:
        """The options that are the graft's own, with everything that depends on the backbone made explicit."""

    def layer_choice(self) -> list[int] | str:
        return self.options.layers

    def layers(self, graph: "LvlmGraph") -> list[int]:
        return resolve_layers(self.layer_choice(), graph.num_hidden_layers, self.name)

    def requires(self, graph: "LvlmGraph") -> None:
        self.layers(graph)
        self.check_backbone(graph)
        grafted = [entry["layers"] for entry in graph.record["grafts"] if entry["kind"] == self.kind]
        if grafted:
            raise PreconditionError(
                f"pass {self.name} is already applied, at layers {', '.join(map(str, grafted[0]))}; "
                "patch the unpatched checkpoint"
            )

    def resolved(self, graph: "LvlmGraph") -> dict[str, Any]:
        return {"layers": self.layers(graph), **self._options(graph)}

    def recorded(self, graph: "LvlmGraph") -> dict[str, Any]:
        """The graft's entry in the record, beside its kind and layers."""
        return self._options(graph)

    def rewrite(self, graph: "LvlmGraph") -> PassResult:
        touched = graph.graft(self.kind, self.layers(graph), self.recorded(graph))
        return PassResult(modified=True, touched=touched)

    def ensures(self, graph: "LvlmGraph", result: PassResult) -> None:
        expected = [f"{graph.family.text_model}.layers.{i}.{self.kind}" for i in self.layers(graph)]
        if sorted(result.touched) != sorted(expected):
            raise PostconditionError(f"pass {self.name} was to add {expected} and added {result.touched}")

    def _options(self, graph: "LvlmGraph") -> dict[str, Any]:
        return {**self.graft_options(graph), "visibility": self._visibility(graph)}

    def _visibility(self, graph: "LvlmGraph") -> Visibility:
        """The one to record. Raises PreconditionError where the checkpoint's other grafts have another."""
        choice, grafts = self.options.visibility, graph.record["grafts"]
        if not grafts:
            return choice or "causal"
        recorded: Visibility = grafts[-1].get("visibility", "all")
        if choice not in (None, recorded):
            raise PreconditionError(
                f"pass {self.name}: visibility={choice}, but the {grafts[-1]['kind']} grafts of this checkpoint have "
                f"visibility={recorded}, and grafts of one model read one memory; leave visibility out, or patch the "
                "unpatched checkpoint"
            )
        return recorded
