"""The record in a patched checkpoint's config: what has to be in it before a model can be made of it."""

from collections import Counter
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from surgeon.errors import CheckpointError
from surgeon.memory.patched import MODEL_TYPE_PREFIX, RECORD


class _Part(BaseModel):
    """Keys that are not named here are another version's, or a graft's own options."""

    model_config = ConfigDict(strict=True, extra="allow")


class _Graft(_Part):
    kind: str
    layers: list[NonNegativeInt] = Field(min_length=1)
    visibility: Literal["causal", "all"] = "all"


class _Layout(_Part):
    side: PositiveInt
    thumbnail: Literal["first", "last"]


class _Positions(_Part):
    scheme: Literal["rope_dhr"]
    tile_order: Literal["row", "column"]


class _Record(_Part):
    grafts: list[_Graft]
    passes: list[dict[str, Any]] = []
    layout: _Layout | None = None
    positions: _Positions | None = None
    allocation: Literal["both", "context", "memory"] = "both"
    source: dict[str, Any] | None = None


def check_record(config: dict[str, Any]) -> None:
    """Raises CheckpointError for a config.json whose model_type says that the model is patched and which does not
    record how, and for a record that no model can be made of. A plain model's config passes."""
    patched = str(config.get("model_type")).startswith(MODEL_TYPE_PREFIX)
    if not patched and config.get(RECORD) is None:
        return
    content = config.get(RECORD)
    if not content:
        raise CheckpointError(
            f"config.json is of model_type {config.get('model_type')!r}, a patched model, and its record {RECORD!r} is "
            f"{'missing' if RECORD not in config else 'empty'}, so its grafts are not known; copy config.json again "
            "from where the checkpoint was written"
        )
    try:
        record = _Record.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, (RECORD, *first["loc"])))
        raise CheckpointError(
            f"config.json: {where}: {first['msg'][:1].lower()}{first['msg'][1:]} (it holds {first['input']!r:.80}); "
            "copy config.json again from where the checkpoint was written"
        ) from error
    if not record.grafts and record.layout is None:
        raise CheckpointError(
            f"config.json: the record {RECORD!r} has neither grafts nor tile positions, so the model is not patched; "
            "copy config.json again from where the checkpoint was written"
        )
    if len({graft.visibility for graft in record.grafts}) > 1:
        raise CheckpointError(
            f"config.json: {RECORD}.grafts have different visibilities, and grafts of one model read one memory; copy "
            "config.json again from where the checkpoint was written"
        )
    _check_layers(record.grafts, config)


def _check_layers(grafts: list[_Graft], config: dict[str, Any]) -> None:
    text = config.get("text_config")
    depth = text.get("num_hidden_layers") if isinstance(text, dict) else None
    for (kind, layer), times in Counter((graft.kind, layer) for graft in grafts for layer in graft.layers).items():
        if times > 1:
            raise CheckpointError(f"config.json: {RECORD}.grafts has two grafts {kind} at layer {layer}")
        if type(depth) is int and layer >= depth:
            raise CheckpointError(
                f"config.json: {RECORD}.grafts has a graft {kind} at layer {layer}, and the decoder has {depth} layers"
            )
