"""The weight files of a patched checkpoint: the source's, shared or with new rows, and one of new tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Literal

from surgeon.checkpoint.reader import Checkpoint
from surgeon.checkpoint.rows import rewrite_file, write_rows
from surgeon.checkpoint.share import share_file
from surgeon.checkpoint.writer import PlannedTensor, write_safetensors
from surgeon.progress import Progress
from surgeon.weights import Extended, Initialised

WeightsMode = Literal["auto", "copy", "link"]


@dataclass
class WrittenWeights:
    """What stands in the output's index, and what it took to write it."""

    weight_map: dict[str, str] = field(default_factory=dict)
    """Tensor key -> file name."""
    methods: dict[str, str] = field(default_factory=dict)
    """The source's weight files, as the output names them -> how they came there."""
    bytes_written: int = 0


def write_source_weights(
    source: Checkpoint,
    directory: Path,
    mode: WeightsMode,
    tables: Mapping[str, Extended],
    progress: Progress | None,
) -> WrittenWeights:
    """Bring the source's weight files into the directory. `tables`: those that get new rows, by parameter name.

    A file is shared as `mode` says, with two exceptions: where rows are written into spare ones of a table, it is never
    a hard link, which would reach the source; where a table grows, it is written anew. So every tensor is in one file.
    Raises CheckpointError, OSError.
    """
    by_file: dict[Path, list[Extended]] = {}
    for table in tables.values():
        by_file.setdefault(source.tensors[table.key].file, []).append(table)
    total = sum(file.stat().st_size for file in source.files)
    total += sum(_growth(table) for table in tables.values())
    count_bytes = _counter("weights", total, progress)
    written = WrittenWeights()
    names = {}
    for file in source.files:
        # A file named model.safetensors would be taken for the whole model, and the index not looked at.
        name = str(file.relative_to(source.directory))
        name = names[file] = name if name != "model.safetensors" else "model-base.safetensors"
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        changed = by_file.get(file, [])
        if any(table.grows for table in changed):
            planned = {table.key: _planned(source, table) for table in changed}
            written.bytes_written += rewrite_file(source, file, target, planned, count_bytes)
            written.methods[name] = "rewriting"
            continue
        shared = share_file(file, target, "auto" if changed and mode == "link" else mode, count_bytes)
        written.bytes_written += shared.bytes_written
        written.methods[name] = f"{shared.method} and new rows" if changed else shared.method
        for table in changed:
            rows = [each.row for each in table.rows]
            written.bytes_written += write_rows(target, source.tensors[table.key], rows, table.new_rows(source))
    written.weight_map = {key: names[info.file] for key, info in source.tensors.items()}
    return written


def write_new_tensors(file: Path, tensors: Mapping[str, Initialised], progress: Progress | None) -> int:
    """Write the tensors that are not the source's, by parameter name, in a file of their own. Returns its size."""
    total = sum(prod(plan.shape) * plan.dtype.itemsize for plan in tensors.values())
    planned = [
        PlannedTensor(name, plan.dtype, plan.shape, lambda name=name, plan=plan: plan.values(name))  # type: ignore[misc]
        for name, plan in sorted(tensors.items())
    ]
    return write_safetensors(file, planned, {"format": "pt"}, _counter("new tensors", total, progress))


def _planned(source: Checkpoint, table: Extended) -> PlannedTensor:
    return PlannedTensor(table.key, table.dtype, table.shape, lambda: table.table(source))


def _growth(table: Extended) -> int:
    """In bytes."""
    return (prod(table.shape) - prod(table.source_shape)) * table.dtype.itemsize


def _counter(stage: str, total: int, progress: Progress | None) -> Callable[[int], None]:
    done = 0

    def count(number: int) -> None:
        nonlocal done
        done += number
        if progress is not None:
            progress(stage, done, total)

    return count
