"""Patch a checkpoint: run the passes on its graph, and publish the result beside shared weights."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from surgeon.checkpoint.publish import staged
from surgeon.checkpoint.reader import Checkpoint
from surgeon.checkpoint.unchanged import SourceFiles
from surgeon.errors import CheckpointError
from surgeon.grafts import is_patched
from surgeon.graph import LvlmGraph
from surgeon.memory.inserted import Constant
from surgeon.memory.patched import RECORD
from surgeon.model_card import Patch, patched_card
from surgeon.patched_weights import WeightsMode, write_new_tensors, write_source_weights
from surgeon.pipeline import Pass, PreconditionError, run_passes
from surgeon.progress import Progress
from surgeon.published import TensorShapes, check_staged
from surgeon.recipe import FILE_NAME, Recipe
from surgeon.record import SourceRecord
from surgeon.remote_code import (
    foreign_auto_map,
    patched_config,
    set_vocab_size,
    travelling_file_names,
    write_remote_code,
)
from surgeon.side_files import (
    configure_image_processor,
    copy_side_files,
    image_processor_settings,
    name_classes,
)
from surgeon.source_card import README, card_files, keep_cards
from surgeon.version import __version__


@dataclass
class PatchReport:
    """What a patch does, or did."""

    grafts: dict[str, int]
    """Grafted module -> its parameters."""
    source_parameters: int
    tokens: dict[str, int] = field(default_factory=dict)
    """Added token -> its id."""
    tables: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Parameter with a row for each token -> its rows in the source and now; where they are as many, rows that no token
    had were taken."""
    grown_parameters: int = 0
    """By which these tables grew."""
    bytes_written: int = 0
    shared: dict[str, str] = field(default_factory=dict)
    """Weight file of the output -> how it got there: reflink, hardlink or copy; "copy and new rows" (or reflink), where
    rows were then written in place; "rewriting", where a table in it grew."""
    left_out: list[str] = field(default_factory=list)
    """Code of the source, and entries that lead to it, that were not copied."""

    @property
    def new_parameters(self) -> int:
        return sum(self.grafts.values()) + self.grown_parameters


def plan(source: Checkpoint, passes: Sequence[Pass], seed: int = 0) -> tuple[LvlmGraph, PatchReport]:
    """Run the passes; no weight is read and nothing is written. A config alone is enough.

    Raises PreconditionError and the other errors of `run_passes`, CheckpointError, FamilyError.
    """
    graph = LvlmGraph.read(source, seed)
    parameters = sum(p.numel() for p in graph.model.parameters())
    results = run_passes(graph, passes)
    if not any(result.modified for result in results):
        raise CheckpointError("the recipe changes nothing: it has no pass")
    _check_image_processor(graph, source)
    grafts = {path: sum(p.numel() for p in module.parameters()) for path, module in graph.inserted().items()}
    new = set(graph.new_parameters())
    added = {path: n for path, n in grafts.items() if any(name.startswith(path + ".") for name in new)}
    tables = graph.extended_tables()
    report = PatchReport(
        grafts=added,
        source_parameters=parameters,
        tokens=graph.new_tokens,
        tables={name: (table.source_shape[0], table.shape[0]) for name, table in tables.items()},
        grown_parameters=sum(prod(table.shape) - prod(table.source_shape) for table in tables.values()),
    )
    return graph, report


def patch(
    source: str | Path,
    target: str | Path,
    passes: Sequence[Pass],
    *,
    seed: int = 0,
    weights: WeightsMode = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> PatchReport:
    """Write a patched copy of a checkpoint: an ordinary transformers directory, complete or not there at all.

    The source's weight files are shared (`weights`: see `share_file`) and never changed; new tensors have a file of
    their own. A file with a table that new tokens need rows of is never hard-linked: the rows are written into a copy
    of it, or, where the table grows, the file is written anew. `trust_remote_code` keeps Python files of the source and
    what in its configs leads to them, for whoever loads the copy with transformers' argument of that name; none is run
    here.
    Raises SurgeonError kinds; nothing is left behind then.
    """
    with Checkpoint.open(source) as checkpoint:
        files = SourceFiles.of_checkpoint(checkpoint)
        graph, report = plan(checkpoint, passes, seed)

        def verify(directory: Path) -> None:
            files.check()
            check_staged(directory, _planned(graph, checkpoint))

        with staged(Path(target), overwrite, [checkpoint.directory], verify=verify) as directory:
            _write(graph, checkpoint, directory, passes, weights, trust_remote_code, report, progress)
    return report


def _check_image_processor(graph: LvlmGraph, source: Checkpoint) -> None:
    """Raises PreconditionError where what the passes set of the image processor does not go with the rest of it."""
    settings = image_processor_settings(source.directory)
    if not graph.image_processor or not settings:  # a config alone has none
        return
    try:
        graph.family.image_processor_sizes.model_validate({**settings, **graph.image_processor})
    except ValidationError as error:
        wrong = [detail for detail in error.errors() if detail["type"] != "missing"]  # transformers has a default then
        if wrong:
            changes = ", ".join(f"{name}={value}" for name, value in sorted(graph.image_processor.items()))
            reason = wrong[0]["msg"].removeprefix("Value error, ")
            raise PreconditionError(
                f"the passes set {changes} of the image processor, which would then be refused: {reason}; name both "
                "limits, or others"
            ) from error


def _planned(graph: LvlmGraph, source: Checkpoint) -> TensorShapes:
    """Every tensor of the output: the source's, some with more rows, and the new ones."""
    source_tensors = {key: (info.torch_dtype, info.shape) for key, info in source.tensors.items()}
    extended = {table.key: (table.dtype, table.shape) for table in graph.extended_tables().values()}
    new = {name: (plan.dtype, plan.shape) for name, plan in graph.new_parameters().items()}
    return source_tensors | extended | new


def _write(
    graph: LvlmGraph,
    source: Checkpoint,
    directory: Path,
    passes: Sequence[Pass],
    weights: WeightsMode,
    trust_remote_code: bool,
    report: PatchReport,
    progress: Progress | None,
) -> None:
    record = {**graph.record, "version": __version__, "source": SourceRecord.of(source).to_json()}
    setattr(graph.config, RECORD, record)
    # first of all, because an extended tokenizer is tried there: nothing large is copied for one that does not work
    _write_side_files(graph, source, directory, trust_remote_code, report)
    written = write_source_weights(source, directory, weights, graph.extended_tables(), progress)
    report.shared = written.methods
    report.bytes_written += written.bytes_written
    weight_map, new = written.weight_map, graph.new_parameters()
    if new:
        applied = dict.fromkeys(name for entry in _applied_now(graph, source) for name in entry)
        new_file = _unused(f"model-{'-'.join(applied)}", weight_map)
        report.bytes_written += write_new_tensors(directory / new_file, new, progress)
        weight_map |= dict.fromkeys(new, new_file)

    config = patched_config(source.config, graph.family.model_type, record, trust_remote_code)
    if report.grown_parameters:
        text_size = graph.family.text_config(graph.config).vocab_size
        set_vocab_size(config, text_size, graph.config.to_dict().get("vocab_size"))
    total = sum(prod(shape) * dtype.itemsize for dtype, shape in _planned(graph, source).values())
    patch = Patch(
        source=source,
        before=source.config.get(RECORD) or {},
        record=record,
        model=graph.model,
        passes=passes,
        seed=graph.seed,
        trust_remote_code=trust_remote_code,
        closed=_gates_closed(graph),
        other_images=bool(graph.image_processor),
    )
    recipe = Recipe(seed=graph.seed, passes=[dict(entry) for entry in _applied_now(graph, source)])
    texts = {
        "config.json": json.dumps(config, indent=2) + "\n",
        "model.safetensors.index.json": json.dumps(
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2
        ),
        FILE_NAME: recipe.dump(),
        README: patched_card(patch, directory),
    }
    for name, text in texts.items():
        report.bytes_written += (directory / name).write_bytes(text.encode(errors="replace"))


def _write_side_files(
    graph: LvlmGraph, source: Checkpoint, directory: Path, trust_remote_code: bool, report: PatchReport
) -> None:
    """Everything but weights, config, recipe and model card. Warns of the source's code that stays behind."""
    code = travelling_file_names(source.config)
    cards = [path.name for path in card_files(source)]
    copied = copy_side_files(source, directory, {FILE_NAME, *code, *cards}, trust_remote_code)
    report.bytes_written += copied.bytes_written + keep_cards(source, directory)
    report.left_out = copied.left_out
    if not trust_remote_code and (entries := foreign_auto_map(source.config)):
        report.left_out.append(f"auto_map of config.json ({', '.join(sorted(entries))})")
    if report.left_out:
        warnings.warn(
            f"left out, because they are code of the source or lead to it: {', '.join(report.left_out)}; "
            "--trust-remote-code keeps them",
            stacklevel=2,
        )
    if graph.image_processor:
        configure_image_processor(directory, graph.image_processor)
    if is_patched(graph.config):
        name_classes(directory, graph.family)
        report.bytes_written += write_remote_code(directory, graph.config)
    if graph.new_tokens:
        report.bytes_written += graph.vocabulary.extend_files(directory, list(graph.new_tokens))


def _gates_closed(graph: LvlmGraph) -> bool:
    """Whether every gate of the new grafts is zero."""
    gates = {f"{path}.{gate}" for path, module in graph.grafts().items() for gate in module.gates}
    return all(plan.initialiser == Constant(0.0) for name, plan in graph.new_parameters().items() if name in gates)


def _applied_now(graph: LvlmGraph, source: Checkpoint) -> list[dict[str, Any]]:
    """The recorded passes that the source does not have already."""
    before = (source.config.get(RECORD) or {}).get("passes", [])
    applied: list[dict[str, Any]] = graph.record["passes"]
    return applied[len(before) :]


def _unused(stem: str, weight_map: dict[str, str]) -> str:
    used_names = set(weight_map.values())
    name, n = f"{stem}.safetensors", 1
    while name in used_names:
        n += 1
        name = f"{stem}-{n}.safetensors"
    return name
