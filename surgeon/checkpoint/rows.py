"""Tables of a safetensors file with other rows: written in place into a copy, or with the whole file anew."""

import os
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path

import torch

from surgeon.checkpoint.headers import TensorInfo, read_metadata
from surgeon.checkpoint.reader import Checkpoint
from surgeon.checkpoint.writer import PlannedTensor, write_safetensors


def write_rows(file: Path, table: TensorInfo, rows: Sequence[int], values: torch.Tensor) -> int:
    """Write rows of a table into `file`, a copy of the one that `table` was read from, where they lie in it; nothing
    else of it changes. `values`: [N, ...] in the table's dtype, a row for each of `rows`. Returns the bytes written.

    The file is written in place: never one that shares its blocks by a hard link. Raises ValueError for rows that are
    no rows of the table, OSError.
    """
    if values.dtype != table.torch_dtype or tuple(values.shape) != (len(rows), *table.shape[1:]):
        raise ValueError(f"rows {list(values.shape)} of {values.dtype} for {table.name}, {list(table.shape)}")
    if not all(0 <= row < table.shape[0] for row in rows):
        raise ValueError(f"{table.name} has rows 0 to {table.shape[0] - 1}, not all of {list(rows)[:8]}")
    nbytes = prod(table.shape[1:]) * table.torch_dtype.itemsize
    data = values.detach().cpu().contiguous().view(torch.uint8).reshape(len(rows), nbytes).numpy()
    handle = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        for row, one in zip(rows, data, strict=True):
            view, at = memoryview(one), table.offset + row * nbytes
            while view:
                count = os.pwrite(handle, view, at)
                view, at = view[count:], at + count
    finally:
        os.close(handle)
    return len(rows) * nbytes


def rewrite_file(
    source: Checkpoint,
    file: Path,
    target: Path,
    changed: Mapping[str, PlannedTensor],
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write a weight file of `source` anew, tensor by tensor in its order and with its metadata; those in `changed`, by
    name, are as planned there. Returns the file's size. Raises CheckpointError and OSError as `write_safetensors`."""
    mapped: list[str] = []

    def stored(name: str) -> torch.Tensor:
        while mapped:
            source.release(mapped.pop())
        mapped.append(name)
        return source.read(name)

    infos = [info for info in source.tensors.values() if info.file == file]
    plan = [
        changed[info.name]
        if info.name in changed
        else PlannedTensor(info.name, info.torch_dtype, info.shape, lambda name=info.name: stored(name))  # type: ignore[misc]
        for info in infos
    ]
    size = write_safetensors(target, plan, read_metadata(file), progress)
    while mapped:
        source.release(mapped.pop())
    return size
