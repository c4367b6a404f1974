"""Safetensors headers: what a weight file holds and where, without reading a weight.

A file is an 8-byte little-endian length N, N bytes of JSON (name -> dtype, shape, data_offsets relative to the data),
then the data, every byte of which belongs to exactly one tensor.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from surgeon.errors import CheckpointError

MAX_HEADER = 100_000_000
"""The safetensors library refuses a longer header, so a file with one loads nowhere."""

_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""Safetensors dtype -> torch dtype. F4 and F6 are valid in a header, but are no torch dtype of the same shape."""

SAFETENSORS_DTYPES: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor in a safetensors file."""

    name: str
    dtype: str
    """As safetensors writes it: "BF16", "F32", "F8_E4M3" ..."""
    shape: tuple[int, ...]
    file: Path
    offset: int
    """Of the first byte, from the start of the file."""
    nbytes: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype. Raises CheckpointError for F4 and F6, which torch has none for."""
        try:
            return TORCH_DTYPES[self.dtype]
        except KeyError:
            raise CheckpointError(f"{self.file}: {self.name} is {self.dtype}, which torch has no dtype for") from None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, in the order of their data.

    Raises CheckpointError where the file is missing, is not safetensors, or disagrees with its own header: an unknown
    dtype, a shape that does not fit its bytes, bytes outside the file, or bytes that two tensors or no tensor own.
    """
    return tensor_infos(path, *_read_json(path))


def tensor_infos(path: Path, entries: dict[str, Any], data_start: int, file_size: int) -> dict[str, TensorInfo]:
    """What `read_header` gives, of a header's entries. Raises CheckpointError where they disagree with the file."""
    infos = [_tensor_info(path, name, entry, data_start) for name, entry in entries.items() if name != "__metadata__"]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    _check_coverage(path, infos, data_start, file_size)
    return {info.name: info for info in infos}


def read_metadata(path: Path) -> dict[str, str]:
    """The `__metadata__` of a safetensors file, empty where it has none. Raises CheckpointError as `read_header`."""
    metadata = _read_json(path)[0].get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ of the safetensors header is not a map of strings")
    return metadata


def header_bytes(path: Path) -> bytes:
    """The raw JSON bytes of the header, padding included. Raises CheckpointError as `read_header`."""
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if prefix.startswith(b"version "):
                raise CheckpointError(
                    f"{path}: a git-lfs pointer, not the weights; run `git lfs pull` where it came from"
                )
            if len(prefix) < 8 or length > size - 8:
                expected = 8 + length if len(prefix) == 8 else 8
                raise CheckpointError(
                    f"{path}: truncated, or not safetensors: the header needs {expected} bytes, the file has {size}; "
                    "download or copy it again"
                )
            if not 2 <= length <= MAX_HEADER:
                raise CheckpointError(
                    f"{path}: not safetensors: a header of {length} bytes (2 to {MAX_HEADER} allowed)"
                )
            return file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read the weight file: {error.strerror or error}") from error


def _read_json(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header's entries, where the data starts, and the file's size."""
    raw = header_bytes(path)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            raise CheckpointError(f"{path}: corrupt safetensors header: a name occurs twice; download or copy it again")
        return entries

    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: corrupt, or not safetensors: the header is not JSON ({error}); download or copy it again"
        ) from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: corrupt safetensors header: a JSON {type(entries).__name__}, not an object")
    return entries, 8 + len(raw), path.stat().st_size


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    def corrupt(reason: str) -> CheckpointError:
        return CheckpointError(f"{path}: corrupt safetensors header: {name}: {reason}; download or copy it again")

    if not isinstance(entry, dict):
        raise corrupt(f"{entry!r} is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise corrupt(f"unknown dtype {dtype!r}")
    if not _are_sizes(shape):
        raise corrupt(f"shape {shape!r}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise corrupt(f"data_offsets {offsets!r}")
    bits, nbytes = math.prod(shape) * _BITS[dtype], offsets[1] - offsets[0]
    if bits != nbytes * 8:
        raise corrupt(f"{dtype} {list(shape)} needs {-(-bits // 8)} bytes, its data_offsets span {nbytes}")
    return TensorInfo(name, dtype, tuple(shape), path, data_start + offsets[0], nbytes)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _check_coverage(path: Path, infos: list[TensorInfo], data_start: int, file_size: int) -> None:
    """Tensors follow each other without overlap or hole, from the header's end to the file's."""
    end, last = data_start, "the header"
    for info in infos:
        if info.offset != end:
            defect = "overlaps" if info.offset < end else "leaves a hole after"
            raise CheckpointError(
                f"{path}: corrupt safetensors header: {info.name} starts at byte {info.offset} and {defect} {last}, "
                f"which ends at {end}; download or copy it again"
            )
        end, last = info.offset + info.nbytes, info.name
    if end != file_size:
        defect = "truncated" if file_size < end else "followed by bytes of no tensor"
        raise CheckpointError(
            f"{path}: {defect}: its header says {end} bytes, the file has {file_size}; download or copy it again"
        )
