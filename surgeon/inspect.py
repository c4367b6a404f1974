"""What there is to know about a checkpoint without reading a weight, and about the passes that could rewrite it."""

from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticUndefined

# For type checking only: printing an inspection must not import torch.
if TYPE_CHECKING:
    from surgeon.checkpoint.reader import Checkpoint
    from surgeon.graph import LvlmGraph
    from surgeon.pipeline import Registry


class _Report(BaseModel):
    model_config = ConfigDict(frozen=True)


class TextSizes(_Report):
    layers: int
    hidden_size: int
    intermediate_size: int
    attention_heads: int
    key_value_heads: int
    head_dim: int
    vocab_size: int


class VisionSizes(_Report):
    layers: int
    hidden_size: int
    attention_heads: int
    patch_size: int


class GraftSites(_Report):
    """Where grafts can go. A graft's latent width is a multiple of `latent_multiple`, the backbone's head_dim."""

    first_layer: int
    last_layer: int
    latent_multiple: int


class GraftEntry(_Report):
    """One graft of the checkpoint's record. `parameters`: over all its layers."""

    kind: str
    layers: list[int]
    options: dict[str, Any]
    parameters: int


class TokenEntry(_Report):
    """One added token of the checkpoint's record. Its row in the embeddings and the head is its id. `grown`: whether
    the tables grew by it; else it has a row that no token had."""

    text: str
    id: int
    grown: bool


class Part(_Report):
    """Part of a model. Tied parameters count once, where they are stored; `lm_head` has 0 then."""

    name: str
    parameters: int
    bytes: int


class Tiles(_Report):
    """How an image's tiles stand in the sequence: `side` x `side` visual tokens each, the thumbnail first or last.

    positions: "plain", or "rope_dhr" with the order of tiles whose ids it gives. allocation: whether tiles go to the
    context path, the memory path or both.
    """

    side: int
    thumbnail: str
    positions: str
    tile_order: str | None
    allocation: str


class WeightFile(_Report):
    name: str
    bytes: int
    tensors: int


class Inspection(_Report):
    """What `surgeon inspect` reports. `dtype`: the one most weights have, as torch names it, without `torch.`.

    parts: vision tower (without the projector), projector, embeddings, decoder, lm_head, then each graft by its module
      path; their parameters and bytes add up to `parameters` and `bytes`.
    files: empty for a config alone.
    vismem: what is recorded of memory that the model calls for; None for a model that calls for none.
    tiles: None for a family that does not cut images into tiles beside a thumbnail.
    passes: the pass record of a patched checkpoint, `{name: options}` each, in order; `source`: what they ran on.
    """

    path: str
    family: str
    dtype: str
    tied_embeddings: bool
    text: TextSizes
    vision: VisionSizes
    deepstack_layers: int
    graft_sites: GraftSites
    grafts: list[GraftEntry]
    tokens: list[TokenEntry]
    vismem: dict[str, Any] | None
    tiles: Tiles | None
    passes: list[dict[str, Any]]
    source: dict[str, Any] | None
    parts: list[Part]
    parameters: int
    bytes: int
    files: list[WeightFile]


class OptionDescription(_Report):
    name: str
    type: str
    required: bool
    default: Any
    description: str


class PassDescription(_Report):
    """`identity`: whether the patched model computes exactly the source's logits until it is trained."""

    name: str
    summary: str
    identity: bool
    options: list[OptionDescription]


def inspect_checkpoint(path: str | Path) -> Inspection:
    """Describe a checkpoint directory or hub id, plain or patched; a config alone is enough.

    Raises CheckpointError, FamilyError.
    """
    from surgeon.checkpoint.reader import Checkpoint
    from surgeon.dtypes import name_of
    from surgeon.graph import LvlmGraph

    with Checkpoint.open(path, weights="optional") as checkpoint:
        graph = LvlmGraph.read(checkpoint)
    family, config = graph.family, graph.config
    text, vision = family.text_config(config), family.vision_config(config)
    parts = _parts(graph)
    sizes = {part.name: part.parameters for part in parts}
    return Inspection(
        path=str(path),
        family=family.model_type,
        dtype=name_of(graph.dtype),
        tied_embeddings=f"{family.lm_head}.weight" in graph.model.all_tied_weights_keys,
        text=TextSizes(
            layers=graph.num_hidden_layers,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            attention_heads=text.num_attention_heads,
            key_value_heads=text.num_key_value_heads,
            head_dim=family.head_dim(config),
            vocab_size=text.vocab_size,
        ),
        vision=VisionSizes(
            layers=_first(vision, "depth", "num_hidden_layers"),
            hidden_size=vision.hidden_size,
            attention_heads=_first(vision, "num_heads", "num_attention_heads"),
            patch_size=_first(vision, "patch_size"),
        ),
        deepstack_layers=family.deepstack_layers(config),
        graft_sites=GraftSites(
            first_layer=0, last_layer=graph.num_hidden_layers - 1, latent_multiple=family.head_dim(config)
        ),
        grafts=[
            GraftEntry(
                kind=entry["kind"],
                layers=entry["layers"],
                options={key: value for key, value in entry.items() if key not in ("kind", "layers")},
                parameters=sum(sizes[f"{family.text_model}.layers.{i}.{entry['kind']}"] for i in entry["layers"]),
            )
            for entry in graph.record["grafts"]
        ],
        tokens=[
            TokenEntry(text=token, id=token_id, grown=token_id >= graph.record["source_vocab_size"])
            for token, token_id in graph.record.get("tokens", {}).items()
        ],
        vismem=graph.record.get("vismem"),
        tiles=_tiles(graph),
        passes=graph.record.get("passes", []),
        source=graph.record.get("source"),
        parts=parts,
        parameters=sum(part.parameters for part in parts),
        bytes=sum(part.bytes for part in parts),
        files=_files(checkpoint),
    )


def _files(checkpoint: "Checkpoint") -> list[WeightFile]:
    infos_by_file = {
        file: [info for info in checkpoint.tensors.values() if info.file == file] for file in checkpoint.files
    }
    return [
        WeightFile(
            name=str(file.relative_to(checkpoint.directory)),
            bytes=max((info.offset + info.nbytes for info in infos), default=0),  # the file may be on the hub
            tensors=len(infos),
        )
        for file, infos in infos_by_file.items()
    ]


def _tiles(graph: "LvlmGraph") -> Tiles | None:
    layout = graph.family.tile_layout(graph.config)
    if layout is None:
        return None
    scheme = graph.record.get("positions") or {}
    return Tiles(
        side=layout.side,
        thumbnail=layout.thumbnail,
        positions=scheme.get("scheme", "plain"),
        tile_order=scheme.get("tile_order"),
        allocation=graph.record.get("allocation", "both"),
    )


def _parts(graph: "LvlmGraph") -> list[Part]:
    family = graph.family
    grafts = list(graph.inserted())
    # The first prefix that fits is a parameter's part, so what lies within another comes before it.
    prefixes = {
        **{path: path for path in grafts},
        family.projector: "projector",
        family.vision_tower: "vision tower",
        f"{family.text_model}.embed_tokens": "embeddings",
        family.text_model: "decoder",
        family.lm_head: "lm_head",
    }
    order = ["vision tower", "projector", "embeddings", "decoder", "lm_head", *grafts]
    parameters, sizes = dict.fromkeys(order, 0), dict.fromkeys(order, 0)
    for name, parameter in graph.model.named_parameters():  # a tied one once
        part = next((part for prefix, part in prefixes.items() if name.startswith(prefix + ".")), "other")
        weight_source = graph.weights[name]
        dtype = getattr(weight_source, "dtype", parameter.dtype)
        parameters[part] = parameters.get(part, 0) + parameter.numel()
        sizes[part] = sizes.get(part, 0) + parameter.numel() * dtype.itemsize
    return [Part(name=name, parameters=count, bytes=sizes[name]) for name, count in parameters.items()]


def _first(config: Any, *names: str) -> int:
    """The first of these attributes that a config has: families name the same size differently."""
    value = next(getattr(config, name) for name in names if hasattr(config, name))
    return int(value[0] if isinstance(value, list | tuple) else value)  # a patch's height and width, which are equal


def describe_passes(registry: "Registry") -> list[PassDescription]:
    """Every pass of a registry with its options, by name."""
    return [
        PassDescription(
            name=name,
            summary=pass_class.summary,
            identity=pass_class.identity,
            options=_options(pass_class.Options.model_fields),
        )
        for name, pass_class in sorted(registry.items())
    ]


def _options(fields: Mapping[str, Any]) -> list[OptionDescription]:
    return [
        OptionDescription(
            name=name,
            type=_type_name(field.annotation),
            required=field.is_required(),
            default=None if field.default is PydanticUndefined else field.default,
            description=field.description or "",
        )
        for name, field in fields.items()
    ]


def _type_name(annotation: Any) -> str:
    """As one would say it: `int`, `list[int] | str`, `row | column`; that an option may be left out is its default."""
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(_type_name(part) for part in get_args(annotation) if part is not type(None))
    return annotation.__name__ if type(annotation) is type else str(annotation)
