"""Safetensors files written as a stream: the header first, then one tensor at a time."""

import errno
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from surgeon.checkpoint.headers import SAFETENSORS_DTYPES
from surgeon.errors import CheckpointError

_ALIGNMENT = 64
_CHUNK = 64 << 20
_PT_METADATA = {"format": "pt"}  # whose layout the tensors have; transformers asks


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written, computed only when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]
    """-> a tensor of that dtype and shape, on any device. Called once; not kept."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: Path,
    tensors: Iterable[PlannedTensor],
    metadata: Mapping[str, str] = _PT_METADATA,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write a new safetensors file and return its size. The data keeps the order of `tensors` and starts at a multiple
    of 64.

    Never more than one tensor is in memory. `progress(n)` is called after each n bytes of data. Raises ValueError for
    two tensors of one name, a dtype that safetensors has not, or a tensor that is not of its planned dtype and shape;
    CheckpointError for one out of a file that was cut short; OSError where the file exists or cannot be written. After
    an error the file is incomplete: write into a staging directory.
    """
    plan = list(tensors)
    header = _header(plan, metadata)
    size = len(header)
    with open(path, "xb", buffering=0) as file:

        def write(view: memoryview, report: Callable[[int], None] | None) -> None:
            while view:
                count = file.write(view[:_CHUNK])
                view = view[count:]
                if report:
                    report(count)

        write(memoryview(header), None)
        for item in plan:
            try:
                write(_bytes_of(item), progress)
            except OSError as error:
                if error.errno != errno.EFAULT:
                    raise
                # its bytes are those of a mapped file that has become shorter
                raise CheckpointError(f"{item.name}: the file it comes from was cut short while it was read") from error
            size += item.nbytes
    return size


def _header(plan: list[PlannedTensor], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for item in plan:
        if item.name in entries or item.name == "__metadata__":
            raise ValueError(f"two tensors named {item.name}")
        if item.dtype not in SAFETENSORS_DTYPES:
            raise ValueError(f"{item.name}: safetensors has no dtype for {item.dtype}")
        start, end = end, end + item.nbytes
        entries[item.name] = {
            "dtype": SAFETENSORS_DTYPES[item.dtype],
            "shape": list(item.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(item: PlannedTensor) -> memoryview:
    """The computed tensor's bytes. The view keeps the tensor alive, and nothing else does."""
    tensor = item.make()
    if tensor.dtype != item.dtype or tuple(tensor.shape) != item.shape:
        raise ValueError(
            f"{item.name}: planned as {item.dtype} {item.shape}, made as {tensor.dtype} {tuple(tensor.shape)}"
        )
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
