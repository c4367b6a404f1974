"""What a patched config records, checked where it is read: whoever uses the record may rely on its types."""

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from transformers import PretrainedConfig

from surgeon.checkpoint.hub import hub_origin
from surgeon.checkpoint.reader import Checkpoint
from surgeon.errors import CheckpointError
from surgeon.families import Family
from surgeon.grafts import asks_for_patched_class, graft_class
from surgeon.memory.patched import MODEL_TYPE_PREFIX, RECORD
from surgeon.memory.visibility import Visibility
from surgeon.record_vismem import VisMemRecord
from surgeon.sizes import Positive, Size, TokenId, check

_REMEDY = "copy config.json from where the checkpoint was made, or patch the source again"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Layout(_Strict):
    """How an image's visual tokens lie in the sequence: side * side for each tile, row by row, and for the thumbnail,
    which is there unless there is one tile only."""

    side: Size
    thumbnail: Literal["first", "last"]


class PositionScheme(_Strict):
    """How position ids are made where they are not the family's own; the rule is in docs/bundle.md."""

    scheme: Literal["rope_dhr"]
    tile_order: Literal["row", "column"]


Allocation = Literal["both", "context", "memory"]
"""Where an image's tiles go beside its thumbnail: into the sequence and the memory, or into one of them."""


class AnyGraft(BaseModel):
    """What the entry of a graft of any kind has, beside options of its own."""

    model_config = ConfigDict(strict=True, frozen=True)

    kind: str
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    visibility: Visibility = "all"


class GraftRecord(AnyGraft):
    """The entry of a graft of one kind, with all of its options."""

    model_config = ConfigDict(extra="forbid")

    def misfit(self, described: Family, config: PretrainedConfig) -> str | None:
        """Why it cannot be a graft of a model of these sizes; None where it can."""
        return None


class PvmRecord(GraftRecord):
    latent: Size

    def misfit(self, described: Family, config: PretrainedConfig) -> str | None:
        head_dim = described.head_dim(config)
        if self.latent % head_dim:
            return f"latent {self.latent} is not divisible by the backbone's head_dim {head_dim}"
        return None


class MixinRecord(GraftRecord):
    num_heads: Size
    head_dim: Annotated[Size, Field(multiple_of=2)]
    intermediate: Size
    rope_theta: Positive
    eps: Positive
    rope_axes: list[int] | None = None
    """For each rotary frequency the axis of positions that it turns with; none where there is one axis."""

    def misfit(self, described: Family, config: PretrainedConfig) -> str | None:
        if self.rope_axes is not None:
            axes = set(described.rope_axes(config))
            if len(self.rope_axes) != self.head_dim // 2 or not axes.issuperset(self.rope_axes):
                frequencies = self.head_dim // 2
                return f"rope_axes does not name one of the axes {sorted(axes)} for each of {frequencies} frequencies"
        return None


class OtherGraft(GraftRecord):
    """Of a kind whose options are not described here: its own class checks them."""

    model_config = ConfigDict(extra="allow")


GRAFTS: dict[str, type[GraftRecord]] = {"pvm": PvmRecord, "mixin": MixinRecord}
"""By kind, which is also the name of its file in `surgeon/memory`."""


class SourceRecord(_Strict):
    """What was patched."""

    name: str
    model_type: str
    fingerprint: str
    revision: str | None = None
    """The commit, of a model on the hub."""

    @classmethod
    def of(cls, source: Checkpoint) -> "SourceRecord":
        origin = hub_origin(source.directory)
        return cls(
            name=source.name,
            model_type=source.config["model_type"],
            fingerprint=source.fingerprint(),
            revision=None if origin is None else origin.revision,
        )

    def to_json(self) -> dict[str, Any]:
        """As it stands in the config."""
        return self.model_dump(exclude_none=True)


class Record(_Strict):
    """The value of the config's key `surgeon`, without the options of each kind of graft."""

    grafts: list[dict[str, Any]]
    passes: list[Annotated[dict[str, dict[str, Any]], Field(min_length=1, max_length=1)]] = []
    version: str | None = None
    source: SourceRecord | None = None
    layout: Layout | None = None
    positions: PositionScheme | None = None
    allocation: Allocation = "both"
    vismem: VisMemRecord | None = None
    tokens: Annotated[dict[str, TokenId], Field(min_length=1)] | None = None
    """The tokens that were added, and their ids."""
    source_vocab_size: Size | None = None
    """How many rows the embeddings had before the first of them was added."""

    @model_validator(mode="after")
    def _says_which_rows_are_new(self) -> "Record":
        if (self.tokens is None) != (self.source_vocab_size is None):
            raise ValueError("tokens and source_vocab_size come together")
        if self.tokens is not None and len(set(self.tokens.values())) < len(self.tokens):
            raise ValueError("two of tokens have one id")
        return self

    @model_validator(mode="after")
    def _says_where_tiles_lie(self) -> "Record":
        if self.layout is None and (self.positions is not None or self.allocation != "both"):
            raise ValueError("positions and allocation are of tiles, whose layout is missing")
        return self


def has_record(config: dict[str, Any]) -> bool:
    """Whether a config.json records what was done to a plain model. Raises CheckpointError where its model_type says
    that it is patched and its record does not."""
    model_type = str(config.get("model_type"))
    if not model_type.startswith(MODEL_TYPE_PREFIX) and config.get(RECORD) is None:
        return False
    if not config.get(RECORD):
        raise CheckpointError(
            f"config.json is of model_type {model_type!r}, and its record {RECORD!r} is "
            f"{'empty' if RECORD in config else 'missing'}, so its grafts are not known; {_REMEDY}"
        )
    return True


def check_record(described: Family, config: PretrainedConfig, model_type: str) -> None:
    """Raises CheckpointError, with the key, where what a patched config records is no record of this tool's, or none
    that a model of these sizes can have. `model_type`: as config.json has it."""
    record = check(Record, getattr(config, RECORD), RECORD)
    if model_type.startswith(MODEL_TYPE_PREFIX) and not asks_for_patched_class(getattr(config, RECORD)):
        raise CheckpointError(
            f"config.json is of model_type {model_type!r}, and its record {RECORD!r} has neither grafts nor tile "
            f"positions; {_REMEDY}"
        )
    if not (record.grafts or record.positions or record.tokens or record.vismem):
        raise CheckpointError(f"config.json: {RECORD} records neither grafts nor tile positions nor tokens; {_REMEDY}")
    _check_tokens(record, described.text_config(config).vocab_size)
    if record.layout is not None:
        _check_layout(record.layout, described, config)
    entries = {f"{RECORD}.grafts.{number}": entry for number, entry in enumerate(record.grafts)}
    if record.vismem is not None and (misfit := record.vismem.misfit(described, config)) is not None:
        raise CheckpointError(f"config.json: {RECORD}.vismem: {misfit}; {_REMEDY}")
    grafts = [check(AnyGraft, entry, where) for where, entry in entries.items()]
    _check_layers(grafts, described.text_config(config).num_hidden_layers)
    if len({graft.visibility for graft in grafts}) > 1:
        raise CheckpointError(f"config.json: {RECORD}.grafts read one memory, with different visibilities; {_REMEDY}")
    for where, entry in entries.items():
        misfit = check(_record_of(entry["kind"]), entry, where).misfit(described, config)
        if misfit is not None:
            raise CheckpointError(f"config.json: {where}: {misfit}; {_REMEDY}")


def _check_tokens(record: Record, vocab_size: int) -> None:
    for token, token_id in (record.tokens or {}).items():
        if token_id >= vocab_size:
            raise CheckpointError(
                f"config.json: {RECORD}.tokens gives {token!r} the id {token_id}, and vocab_size is {vocab_size}: rows "
                f"were taken away after the tokens were added; {_REMEDY}"
            )


def _check_layout(layout: Layout, described: Family, config: PretrainedConfig) -> None:
    own = described.tile_layout(config)
    if own is None or (own.side, own.thumbnail) != (layout.side, layout.thumbnail):
        expected = "cuts no tiles" if own is None else f"has side {own.side}, thumbnail {own.thumbnail!r}"
        raise CheckpointError(
            f"config.json: {RECORD}.layout has side {layout.side}, thumbnail {layout.thumbnail!r}, and this "
            f"{described.model_type} {expected}; {_REMEDY}"
        )


def _check_layers(grafts: Sequence[AnyGraft], depth: int) -> None:
    counts = Counter((graft.kind, layer) for graft in grafts for layer in graft.layers)
    for (kind, layer), times in counts.items():
        if times > 1:
            raise CheckpointError(f"config.json: {RECORD}.grafts has two grafts {kind} at layer {layer}; {_REMEDY}")
        if layer >= depth:
            raise CheckpointError(
                f"config.json: {RECORD}.grafts has a graft {kind} at layer {layer}, and the decoder has {depth} "
                f"layers; {_REMEDY}"
            )


def _record_of(kind: str) -> type[GraftRecord]:
    if kind in GRAFTS:
        return GRAFTS[kind]
    graft_class(kind)
    return OtherGraft
