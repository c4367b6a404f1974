"""What every model card has: the metadata block of the Hugging Face Hub, and sections common to all checkpoints.

The same inputs give the same bytes: neither dates nor the place of a file are in a card. Nothing is claimed that was
not computed here.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from surgeon.checkpoint.hub import hub_origin
from surgeon.checkpoint.reader import Checkpoint
from surgeon.errors import SurgeonError
from surgeon.grafts import graft_class
from surgeon.markdown import code, command, plain, table
from surgeon.memory.inserted import Inserted
from surgeon.memory.patched import MODEL_TYPE_PREFIX, RECORD
from surgeon.recipe import FILE_NAME, Recipe, argument_of, value_text
from surgeon.remote_code import foreign_auto_map, travelling_file_names
from surgeon.source_card import KEPT, SourceCard
from surgeon.version import __version__

TASK = "image-text-to-text"
TOOL = "surgeon, a tool for surgery on pretrained vision-language models (the Python package `lvlm-surgeon`)"
FINGERPRINT = (
    "The fingerprint is a SHA-256 over the config, the names, sizes and headers of the weight files, and the first and "
    "last 4 KiB of every tensor."
)


def card(source: SourceCard, library: str, card_tags: list[str], sections: Iterable[str]) -> str:
    """The whole file: metadata, then the text."""
    from huggingface_hub import ModelCardData

    bases = source.base_models
    data = ModelCardData(
        base_model=bases[0] if len(bases) == 1 else bases or None,
        library_name=library,
        pipeline_tag=TASK,
        tags=card_tags,
        **source.inherited,
    )
    text = "\n\n".join(sections)
    return f"---\n{data.to_yaml()}\n---\n\n{text}\n"


def tags(record: Mapping[str, Any]) -> list[str]:
    """What the hub finds it by: the tool, and every pass and graft."""
    return ["surgeon", *methods(record)]


def methods(record: Mapping[str, Any]) -> list[str]:
    """The passes and grafts of a record, each once."""
    passes = [name for entry in record.get("passes", []) for name in entry]
    positions = [record["positions"]["scheme"].replace("_", "-")] if record.get("positions") else []
    return list(dict.fromkeys([*passes, *(entry["kind"] for entry in record.get("grafts", [])), *positions]))


def short_name(source: Checkpoint) -> str:
    """Without the organisation of a hub id."""
    return source.name.rpartition("/")[2]


def linked(source: Checkpoint) -> str:
    """The source's name, which leads to the hub if it is from there."""
    if hub_origin(source.directory) is None:
        return code(source.name)
    return f"[{plain(source.name)}](https://huggingface.co/{source.name})"


def facts(source: Checkpoint, fingerprint: str, model_type: str, *more: tuple[str, str]) -> str:
    """The table of the source checkpoint. fingerprint: the source's. more: further rows of label and value, in
    Markdown."""
    origin = hub_origin(source.directory)
    made_of = (source.config.get(RECORD) or {}).get("source") or {}
    at = f" at {code(made_of['revision'])}" if "revision" in made_of else ""
    rows = [
        ("source", linked(source)),
        *([("revision", code(origin.revision))] if origin else []),
        *([("which was made of", f"{code(made_of['name'])}{at}")] if made_of else []),
        ("fingerprint of the source", code(fingerprint)),
        ("family", code(model_type.removeprefix(MODEL_TYPE_PREFIX))),
        *more,
        ("made with", f"surgeon {__version__}"),
    ]
    return f"{table(('', ''), rows)}\n\n{FINGERPRINT}"


def options_text(options: Mapping[str, Any]) -> str:
    """Every option with its value, in a line."""

    return "; ".join(f"{plain(key)} {plain(value_text(value))}" for key, value in options.items()) or "no options"


def grafts_text(record: Mapping[str, Any]) -> str:
    """A line for each kind of graft, for what is done with tiles, and for added tokens, with all options."""
    entries = [(entry["kind"], {k: v for k, v in entry.items() if k != "kind"}) for entry in record["grafts"]]
    if record.get("vismem"):
        entries.append(("vismem", record["vismem"]))
    tiles: dict[str, Any] = record.get("positions") or {}
    if record.get("allocation", "both") != "both":
        tiles = {**tiles, "allocation": record["allocation"]}
    if tiles:
        entries.append(("tiles", tiles))
    if record.get("tokens"):
        entries.append(("added tokens", {token: token_id for token, token_id in record["tokens"].items()}))
    return "\n".join(f"- {code(kind)}: {options_text(options)}" for kind, options in entries)


def parameters_text(model: PreTrainedModel) -> str:
    """How many the backbone has, and each graft."""
    grafts = {path: sum(p.numel() for p in graft.parameters()) for path, graft in grafts_in(model).items()}
    backbone = sum(p.numel() for p in model.parameters()) - sum(grafts.values())
    rows = [("backbone", f"{backbone:,}", "")]
    rows += [(code(path), f"{count:,}", f"{count / backbone:.2%}") for path, count in grafts.items()]
    if grafts:
        total = sum(grafts.values())
        rows.append(("all grafts", f"{total:,}", f"{total / backbone:.2%}"))
    return table(("part", "parameters", "share of the backbone"), rows)


def grafts_in(model: PreTrainedModel) -> dict[str, Inserted]:
    """Module path -> what passes inserted."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Inserted)}


def license_text(source: SourceCard, kept: bool) -> list[str]:
    """What the source's card says of it. kept: whether that card is beside this one."""
    where = f" ([{KEPT}]({KEPT}), which is about the source alone)" if kept and source.exists else ""
    if "license" not in source.inherited:
        state = "has no model card" if not source.exists else f"has a model card{where} that names no license"
        return ["## License", f"Not known: the source {state}. Look its terms up before you publish this."]
    licenses, name = source.inherited["license"], source.inherited.get("license_name")
    licenses_text = listed([licenses] if isinstance(licenses, str) else licenses)
    return ["## License", f"As the source's card says{where}: {licenses_text}{f', {plain(name)}' if name else ''}."]


def tiles_differ(record: Mapping[str, Any]) -> bool:
    """Whether tiles are laid out otherwise than in the plain model, which changes answers whatever the gates are."""
    return bool(record.get("positions") or record.get("allocation", "both") != "both")


def untrained(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has grafts, and every gate of theirs is zero, as at insertion."""
    gates = [
        f".layers.{layer}.{entry['kind']}.{gate}"
        for entry in (checkpoint.config.get(RECORD) or {}).get("grafts", [])
        for layer in entry["layers"]
        for gate in graft_class(entry["kind"]).gates
    ]
    names = [name for name in checkpoint.tensors if name.endswith(tuple(gates))]
    return bool(gates) and len(names) == len(gates) and not any(bool(checkpoint.read(name).any()) for name in names)


def made_by(checkpoint: Checkpoint) -> list[list[str]]:
    """The command that wrote this checkpoint, where its recipe lists all of its passes and its grafts are untrained;
    else none."""
    record = checkpoint.config.get(RECORD) or {}
    name = (record.get("source") or {}).get("name")
    if not record.get("passes") or not name or not (checkpoint.directory / FILE_NAME).is_file():
        return []
    if record["grafts"] and not untrained(checkpoint):
        return []
    own_code = travelling_file_names(checkpoint.config)
    if foreign_auto_map(checkpoint.config) or any(
        file.suffix == ".py" and file.name not in own_code for file in checkpoint.side_files
    ):
        return []  # whether --trust-remote-code kept the code is recorded nowhere
    try:
        recipe = Recipe.read(checkpoint.directory / FILE_NAME)
    except (SurgeonError, RecursionError):
        return []
    arguments = [
        argument_of(pass_name, options or {}) for entry in recipe.passes for pass_name, options in entry.items()
    ]
    if recipe.passes != record["passes"] or None in arguments:
        return []
    passes = [word for each in arguments for word in ("--pass", str(each))]
    return [command("patch", [name, checkpoint.name], *passes, "--seed", str(recipe.seed))]


def listed(names: Iterable[str]) -> str:
    """`a`, `b` and `c`."""
    *first, last = map(code, names)
    return f"{', '.join(first)} and {last}" if first else last


def has_any(directory: Path, names: Iterable[str]) -> bool:
    return any((directory / name).is_file() for name in names)
