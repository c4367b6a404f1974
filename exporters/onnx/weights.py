"""Initialisers bound to safetensors files by offset: what a graph needs of a checkpoint is pointed into, not copied."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import onnx_ir as ir
import torch

from exporters.onnx.dtypes import ir_dtype, torch_dtype
from surgeon.checkpoint import (
    SAFETENSORS_DTYPES,
    Checkpoint,
    PlannedTensor,
    TensorInfo,
    read_header,
    share_file,
    write_safetensors,
)
from surgeon.errors import BundleError
from surgeon.progress import Progress
from surgeon.weights import Stored, Tied, WeightPlan

FOLDER = "weights"


@dataclass(frozen=True)
class PlacedFile:
    """A weight file of a bundle, and how it came there."""

    path: str
    """Relative to the bundle, with forward slashes."""
    how: Literal["reflink", "hardlink", "copy", "converted"]


def bind(
    graphs: Iterable[ir.Model],
    weights: WeightPlan,
    checkpoint: Checkpoint,
    directory: Path,
    progress: Progress | None = None,
) -> list[PlacedFile]:
    """Give every initialiser without a value its tensor, and place the weight files in `directory/weights`.

    The initialisers bear the names of the model's parameters, which `weights`, as `surgeon.models.read_model` checked
    it, finds in the checkpoint. Tensors of the graph's dtype are pointed into where they lie in the checkpoint's files,
    which are shared into the bundle (copied where the file system can do no better); the others are converted once, one
    at a time, into a file of their own. Raises BundleError for a value that cannot be converted.
    """
    unbound = [value for graph in graphs for value in graph.graph.initializers.values() if value.const_value is None]
    pointed: dict[Path, str] = {}
    converted: dict[tuple[str, torch.dtype], TensorInfo] = {}
    for value in unbound:
        info = _find(value, weights, checkpoint)
        dtype = _torch_dtype(value)
        if info.torch_dtype != dtype:
            converted[info.name, dtype] = info
        elif info.file not in pointed:
            # a shard in a subfolder keeps its folder in its name: the bundle has one folder of weights
            pointed[info.file] = f"{FOLDER}/{info.file.relative_to(checkpoint.directory).as_posix().replace('/', '_')}"

    (directory / FOLDER).mkdir()
    placed = _share(pointed, directory, progress)
    at: dict[tuple[str, torch.dtype], TensorInfo] = {}
    for dtype in sorted({dtype for _, dtype in converted}, key=str):
        infos = [info for (_, to), info in converted.items() if to == dtype]
        path = directory / FOLDER / f"converted-{SAFETENSORS_DTYPES[dtype].lower()}.safetensors"
        _convert(checkpoint, infos, dtype, path, progress)
        at |= {(name, dtype): info for name, info in read_header(path).items()}
        placed.append(PlacedFile(f"{FOLDER}/{path.name}", "converted"))

    for value in unbound:
        info = _find(value, weights, checkpoint)
        dtype = _torch_dtype(value)
        if info.torch_dtype == dtype:
            location = pointed[info.file]
        else:
            info = at[info.name, dtype]
            location = f"{FOLDER}/{info.file.name}"
        value.const_value = ir.ExternalTensor(
            location,
            info.offset,
            info.nbytes,
            ir_dtype(dtype),
            shape=ir.Shape(_shape(value)),
            name=str(value.name),
            base_dir=directory,
        )
    return placed


def _find(value: ir.Value, weights: WeightPlan, checkpoint: Checkpoint) -> TensorInfo:
    """The stored tensor of an initialiser, or of the one that it is tied to."""
    source = weights[str(value.name)]
    while isinstance(source, Tied):
        source = weights[source.name]
    assert isinstance(source, Stored)
    info, shape = checkpoint.tensors[source.key], _shape(value)
    # a convolution over whole windows is a Gemm over the same bytes
    assert shape in (info.shape, (*info.shape[:1], math.prod(info.shape[1:]))), f"{value.name} is traced as {shape}"
    return info


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return tuple(int(size) for size in value.shape)  # type: ignore[arg-type]


def _torch_dtype(value: ir.Value) -> torch.dtype:
    assert value.dtype is not None
    return torch_dtype(value.dtype)


def _share(files: Mapping[Path, str], directory: Path, progress: Progress | None) -> list[PlacedFile]:
    placed = []
    for done, (source, target) in enumerate(files.items()):
        if progress:
            progress("weight files", done, len(files))
        shared = share_file(source, directory / target, mode="link")
        placed.append(PlacedFile(target, shared.method))
    if progress and files:
        progress("weight files", len(files), len(files))
    return placed


def _convert(
    checkpoint: Checkpoint, infos: list[TensorInfo], dtype: torch.dtype, path: Path, progress: Progress | None
) -> None:
    """Write the tensors in `dtype`, one at a time."""
    total, done = sum(info.numel for info in infos) * dtype.itemsize, 0

    def make(info: TensorInfo) -> torch.Tensor:
        source = checkpoint.read(info.name)
        tensor = source.to(dtype)
        # fp16 ends at 65,504: what lies beyond would silently become infinite
        if dtype == torch.float16 and not bool(torch.isfinite(tensor).all()) and bool(torch.isfinite(source).all()):
            raise BundleError(
                f"{info.name} has values beyond fp16's range (largest {float(source.abs().max()):.4g}, fp16 ends at "
                "65504); export with bf16 or fp32"
            )
        checkpoint.release(info.name)
        return tensor

    def written(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(f"converting to {str(dtype).removeprefix('torch.')}", done, total)

    plan = [PlannedTensor(info.name, dtype, info.shape, partial(make, info)) for info in infos]
    write_safetensors(path, plan, progress=written)
