"""Give the model memory that it calls for itself: a query builder, and formers of short and long latent memory."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from surgeon.errors import OptionError
from surgeon.graft_pass import LAYERS, MOST
from surgeon.layer_choice import LayerChoice, resolve_layers
from surgeon.pipeline import Pass, PassOptions, PassResult, PostconditionError, PreconditionError, make_pass

if TYPE_CHECKING:
    from surgeon.graph import LvlmGraph

_TOKENS = ("<ms_I>", "<ms_E>", "<ml_I>", "<ml_E>", "<mem>")
_SEPARATORS = (".", "!", "?", "\n", ".\n", "\n\n", ".\n\n", "。", "！", "？")  # noqa: RUF001
_LEAST_VISUAL = 256


class VisMemOptions(PassOptions):
    query: int = Field(default=8, gt=0, le=256, description="vectors of a query")
    short: int = Field(default=8, gt=0, le=1024, description="latents of a short memory, which looks again")
    long: int = Field(default=16, gt=0, le=1024, description="latents of a long memory, of what was seen and said")
    short_former: Literal["vision", "language"] = Field(
        default="vision",
        description="what forms short memory: the vision tower, as in the paper, or the decoder, as its code does",
    )
    layers: LayerChoice = Field(default="last:4", description=f"{LAYERS}, or last:N; those that form long memory")
    rank: int = Field(default=16, gt=0, le=4096, description="of the formers' low-rank adapters")
    alpha: float = Field(default=32.0, gt=0, allow_inf_nan=False, description="their scale times their rank")
    targets: list[str] = Field(
        default=["q_proj", "k_proj", "v_proj", "o_proj"],
        description="linear layers of a decoder layer that are adapted, by the end of their path",
    )
    vision_targets: list[str] | None = Field(
        default=None,
        description="linear layers of a block of the vision tower that are adapted; by default its attention's",
    )
    window: int = Field(default=1024, gt=0, le=MOST, description="tokens of text that a query is built of at most")
    width: int | None = Field(
        default=None, gt=0, le=MOST, multiple_of=8, description="of the query builder; by default the model's own"
    )
    tokens: list[str] = Field(
        default=list(_TOKENS),
        min_length=5,
        max_length=5,
        description="invoke and end token of short and of long memory, and the placeholder of latents",
    )

    @field_validator("targets", "vision_targets", "tokens", mode="before")
    @classmethod
    def _separate(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


class VisMemPass(Pass):
    """Source: "VisMem: Latent Vision Memory Unlocks Potential of Vision-Language Models"; numbers of latents, rank and
    alpha as published. Which layers form long memory the paper leaves open.

    Nothing of it runs until the model calls for memory, so every other token computes bit for bit what it did.
    """

    name = "vismem"
    summary = "memory that the model calls for itself: tokens that bring latent vectors"
    Options = VisMemOptions
    identity = True
    options: VisMemOptions

    def requires(self, graph: "LvlmGraph") -> None:
        if graph.record.get("vismem"):
            raise PreconditionError("pass vismem is already applied; patch the unpatched checkpoint")
        if graph.source_vocabulary is None:
            raise OptionError(
                "pass vismem reads the checkpoint's tokenizer, which is no part of a model in memory: patch the "
                "checkpoint (surgeon patch)"
            )
        self._require_tokens(graph)
        self._layers(graph)
        self._require_a_tower(graph)
        self._require_room(graph)
        self._require_targets(graph)

    def resolved(self, graph: "LvlmGraph") -> dict[str, Any]:
        options = self.options.model_dump(mode="json")
        return {**options, "layers": self._layers(graph), "vision_targets": self._vision_targets(graph)}

    def rewrite(self, graph: "LvlmGraph") -> PassResult:
        return PassResult(modified=True, touched=graph.add_vismem(self._recorded(graph)))

    def ensures(self, graph: "LvlmGraph", result: PassResult) -> None:
        if len(result.touched) != 1 or not result.touched[0].endswith(".vismem"):
            raise PostconditionError(f"pass vismem was to add one module and added {result.touched}")

    # -- inside ------------------------------------------------------------------------------------------------
    def _recorded(self, graph: "LvlmGraph") -> dict[str, Any]:
        options = self.resolved(graph)
        ids = [graph.record["tokens"][token] for token in options.pop("tokens")]
        separators = sorted({i for i in map(graph.vocabulary.token_id, _SEPARATORS) if i is not None})
        return {
            **options,
            "position_axes": len(set(graph.family.rope_axes(graph.config))),
            "token_ids": {"short": ids[:2], "long": ids[2:4], "placeholder": ids[4]},
            "separators": separators,
        }

    def _layers(self, graph: "LvlmGraph") -> list[int]:
        choice = self.options.layers
        if choice == VisMemOptions.model_fields["layers"].default:
            choice = f"last:{min(4, graph.num_hidden_layers)}"
        return resolve_layers(choice, graph.num_hidden_layers, self.name)

    def _vision_targets(self, graph: "LvlmGraph") -> list[str] | None:
        if self.options.short_former != "vision":
            return None
        tower = graph.family.tower
        assert tower is not None
        return list(tower.targets) if self.options.vision_targets is None else self.options.vision_targets

    def _require_tokens(self, graph: "LvlmGraph") -> None:
        tokens, known = self.options.tokens, graph.record.get("tokens") or {}
        twice = sorted({token for token in tokens if tokens.count(token) > 1})
        if twice:
            raise PreconditionError(f"pass vismem: tokens names {twice[0]!r} twice; each has a part of its own")
        missing = [token for token in tokens if token not in known]
        if missing:
            there = f"; the checkpoint's are {', '.join(known)}" if known else ""
            raise PreconditionError(
                f"pass vismem needs the token {missing[0]!r}, which no pass has added{there}: put --pass memory-tokens "
                "before it, or name the tokens with tokens=<short>,<short end>,<long>,<long end>,<placeholder>"
            )

    def _require_a_tower(self, graph: "LvlmGraph") -> None:
        if self.options.short_former == "vision" and graph.family.tower is None:
            raise PreconditionError(
                f"pass vismem: how the vision tower of family {graph.family.model_type} forms memory is not written "
                "down; use short_former=language, which the decoder does"
            )
        if self.options.short_former == "language" and self.options.vision_targets is not None:
            raise PreconditionError("pass vismem: vision_targets is of short_former=vision; leave it out")

    def _require_room(self, graph: "LvlmGraph") -> None:
        from surgeon.memory.query_builder import NUM_HEADS, POSITIONS

        most = POSITIONS - self.options.query - _LEAST_VISUAL
        if self.options.window > most:
            raise PreconditionError(
                f"pass vismem: window={self.options.window} leaves a query of {POSITIONS} positions too little room "
                f"for images; use at most {most}"
            )
        hidden_size = graph.family.text_config(graph.config).hidden_size
        if self.options.width is None and hidden_size % NUM_HEADS:
            raise PreconditionError(
                f"pass vismem: the model's hidden_size {hidden_size} is not divisible by the query builder's "
                f"{NUM_HEADS} heads; give it a width of its own, width={-(-hidden_size // NUM_HEADS) * NUM_HEADS}"
            )

    def _require_targets(self, graph: "LvlmGraph") -> None:
        """Raises PreconditionError for targets that no linear layer has."""
        from surgeon.memory.lora import check_targets

        layers = [graph.decoder.layers[index] for index in self._layers(graph)]
        checked = [("targets", layers, self.options.targets)]
        vision_targets = self._vision_targets(graph)
        if vision_targets is not None:
            tower: Any = graph.family.tower
            blocks = graph.model.base_model.get_submodule(tower.blocks).children()
            checked.append(("vision_targets", list(blocks), vision_targets))
        for option, modules, targets in checked:
            try:
                check_targets(modules, targets)
            except ValueError as error:
                raise PreconditionError(f"pass vismem: {option}: {error}") from error


PASS = VisMemPass


def VisMem(**options: Any) -> VisMemPass:
    """The pass `vismem`, for `surgeon.patch`; options as `surgeon passes` lists them. Raises OptionError."""
    return make_pass({VisMemPass.name: VisMemPass}, VisMemPass.name, options)  # type: ignore[return-value]
