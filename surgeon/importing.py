"""Import a checkpoint: its importer reads the config, its tensors are streamed, and the rest is written beside them."""

import json
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from surgeon.checkpoint.publish import check_target, staged
from surgeon.checkpoint.reader import Checkpoint
from surgeon.checkpoint.unchanged import SourceFiles
from surgeon.errors import CheckpointError
from surgeon.families import family
from surgeon.importers._layout import Layout
from surgeon.importers._registry import importer_of
from surgeon.importers._tensors import Converted, equal, plan_tensors, write_tensors
from surgeon.model_card import imported_card
from surgeon.models import build_meta, read_config
from surgeon.progress import Progress
from surgeon.published import check_staged
from surgeon.record import SourceRecord
from surgeon.remote_code import patched_config, write_remote_code
from surgeon.side_files import name_classes
from surgeon.source_card import README, keep_cards
from surgeon.version import __version__
from surgeon.weights import check_dtype


@dataclass
class ImportReport:
    """The result of an import."""

    source_type: str
    """Name of the source's layout."""
    model_type: str
    text_model: str
    """The kind of text model in the source."""
    parameters: int
    tensors: int
    bytes_written: int
    image_token_id: int
    grafts: dict[str, list[int]] = field(default_factory=dict)
    """Kind of graft -> the layers that have one."""
    warnings: list[str] = field(default_factory=list)


def import_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    image_token_id: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ImportReport:
    """Write a checkpoint of another layout as one that transformers loads itself: complete or not there at all.

    No code in the checkpoint is run. Weights keep their dtype and their distribution over files, and are streamed: one
    tensor is in memory at a time. `image_token_id` is for a checkpoint without a tokenizer, which says it otherwise.
    Raises CheckpointError for what cannot be converted exactly (a tensor that is left over or missing, with its name),
    OptionError for a token id that cannot be, TargetError; nothing is left behind then.
    """
    with Checkpoint.open(source) as checkpoint:
        files = SourceFiles.of_checkpoint(checkpoint)
        check_target(Path(target), overwrite, [checkpoint.directory])
        name, importer = importer_of(checkpoint)
        layout = importer.read(checkpoint, image_token_id)
        config = _config(layout, checkpoint)
        model = _model(config)
        planned = _plan(checkpoint, layout, model)
        report = ImportReport(
            source_type=name,
            model_type=config["model_type"],
            text_model=layout.text_model,
            parameters=sum(prod(converted.shape) for converted in planned),
            tensors=len(planned),
            bytes_written=0,
            image_token_id=layout.image_token_id,
            grafts={entry["kind"]: entry["layers"] for entry in (layout.record or {}).get("grafts", [])},
            warnings=list(layout.warnings),
        )
        needed = sum(converted.nbytes for converted in planned)

        def verify(directory: Path) -> None:
            files.check()
            check_staged(
                directory, {converted.name: (converted.source.torch_dtype, converted.shape) for converted in planned}
            )

        with staged(Path(target), overwrite, [checkpoint.directory], needed, verify) as directory:
            # What may fail goes before what takes long.
            _write_files(directory, layout, config, report)
            keep_cards(checkpoint, directory)
            card = imported_card(checkpoint, name, model, layout.record, image_token_id, directory)
            (directory / README).write_text(card, encoding="utf-8")
            report.bytes_written = sum(path.stat().st_size for path in directory.iterdir())
            report.bytes_written += write_tensors(checkpoint, planned, directory, progress)
    return report


def _config(layout: Layout, source: Checkpoint) -> dict[str, Any]:
    """config.json of the target."""
    if layout.record is None:
        return layout.config
    record = {**layout.record, "version": __version__, "source": SourceRecord.of(source).to_json()}
    return patched_config(layout.config, layout.config["model_type"], record)


def _model(config: dict[str, Any]) -> PreTrainedModel:
    """The target's, on the meta device."""
    try:
        return build_meta(read_config(config))
    except (ValueError, KeyError, TypeError) as error:  # sizes that do not divide, an activation that is not there
        reason = " ".join(str(error).split())
        raise CheckpointError(f"no model can be made of config.json: {type(error).__name__}: {reason}") from error


def _plan(source: Checkpoint, layout: Layout, model: PreTrainedModel) -> list[Converted]:
    """The target's tensors. A tied output layer that the source stores as well is left out."""
    state = model.state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    tied: dict[str, str] = model.all_tied_weights_keys
    stored_names = {rule_target for info in source.tensors for rule_target in _names(layout, info)}
    absent = {name for name, other in tied.items() if name not in stored_names and other in stored_names}
    planned = plan_tensors(
        source.tensors, layout.rules, {name: shape for name, shape in expected.items() if name not in absent}
    )
    for converted in planned:
        check_dtype(converted.source.name, converted.source.torch_dtype, state[converted.name].dtype)
    by_name = {converted.name: converted.source.name for converted in planned}
    doubled = {name for name, other in tied.items() if name in by_name and other in by_name}
    for name in sorted(doubled):
        first, second = by_name[tied[name]], by_name[name]
        if not equal(source, first, second):
            raise CheckpointError(f"tie_word_embeddings is on in config.json, and {first} and {second} are different")
    return [converted for converted in planned if converted.name not in doubled]


def _names(layout: Layout, key: str) -> list[str]:
    """The target names that a source tensor has rules for."""
    return [
        match.expand(target)
        for rule in layout.rules
        if (match := rule.pattern.fullmatch(key))
        for target in rule.targets
    ]


def _write_files(directory: Path, layout: Layout, config: dict[str, Any], report: ImportReport) -> None:
    """Everything but the weights."""
    (directory / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if layout.record is not None:
        write_remote_code(directory, read_config(config))
    report.warnings += layout.side_files.write(directory, config)
    if layout.record is not None:
        name_classes(directory, family(config["model_type"]))
