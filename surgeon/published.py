"""A staged checkpoint is looked at as whoever loads it will, before it is put in place."""

from collections.abc import Mapping
from pathlib import Path

import torch

from surgeon.checkpoint.reader import Checkpoint
from surgeon.errors import CheckpointError
from surgeon.models import read_model

TensorShapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def check_staged(directory: Path, planned: TensorShapes | None = None) -> None:
    """Read a checkpoint directory: every header against its file, the index, the tensors against the config's model,
    and against `planned`, which says each tensor's dtype and shape by its key, where that is known. No weight is read.

    Raises CheckpointError for the first thing that is not so.
    """
    with Checkpoint.open(directory) as staged:
        read_model(staged)
        written_tensors = {name: (info.torch_dtype, info.shape) for name, info in staged.tensors.items()}
    if planned is None:
        return
    for name in sorted(written_tensors.keys() | planned.keys()):
        if written_tensors.get(name) != planned.get(name):
            expected, actual = _dtype_and_shape(planned.get(name)), _dtype_and_shape(written_tensors.get(name))
            raise CheckpointError(f"{directory}: {name} was to be {expected} and is {actual}")


def _dtype_and_shape(tensor: tuple[torch.dtype, tuple[int, ...]] | None) -> str:
    return "left out" if tensor is None else f"{str(tensor[0]).removeprefix('torch.')} {list(tensor[1])}"
