"""Initialisers bound to safetensors files by offset: what a graph needs of a checkpoint is pointed into, not copied."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from surgeon.checkpoint import (
    SAFETENSORS_DTYPES,
    Checkpoint,
    PlannedTensor,
    TensorInfo,
    read_header,
    share_file,
    write_safetensors,
)
from surgeon.errors import BundleError, CheckpointError
from surgeon.models import parameter_names

FOLDER = "weights"
IR_DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
}
_CONVERTIBLE = (*IR_DTYPES, torch.float64)

Progress = Callable[[str, int, int], None]
"""Called with a stage, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class PlacedFile:
    """A weight file of a bundle, and how it came there."""

    path: str
    """Relative to the bundle, with forward slashes."""
    how: Literal["reflink", "hardlink", "copy", "converted"]


def bind(
    graphs: Iterable[ir.Model],
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    directory: Path,
    progress: Progress | None = None,
) -> list[PlacedFile]:
    """Give every initialiser without a value its tensor, and place the weight files in `directory/weights`.

    The initialisers bear `model`'s parameter names. Tensors of the graph's dtype are pointed into where they lie in the
    checkpoint's files, which are shared into the bundle (copied where the file system can do no better); the others are
    converted once, one at a time, into a file of their own. Raises CheckpointError for a tensor that is missing or of
    another shape, BundleError for one that cannot be converted.
    """
    wanted = [value for graph in graphs for value in graph.graph.initializers.values() if value.const_value is None]
    stored = stored_tensors(model, checkpoint)
    pointed: dict[Path, str] = {}
    converted: dict[tuple[str, torch.dtype], TensorInfo] = {}
    for value in wanted:
        info = _find(value, stored, checkpoint)
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

    for value in wanted:
        info = _find(value, stored, checkpoint)
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
            IR_DTYPES[dtype],
            shape=ir.Shape(_shape(value)),
            name=str(value.name),
            base_dir=directory,
        )
    return placed


def stored_tensors(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """The model's parameter names -> where the checkpoint has them. Tied parameters have the tensor of any of them."""
    keys = parameter_names(model, checkpoint.tensors)
    stored = {name: checkpoint.tensors[key] for key, name in keys.items()}
    found = {id(p): stored[n] for n, p in model.named_parameters(remove_duplicate=False) if n in stored}
    tied = {n: found[id(p)] for n, p in model.named_parameters(remove_duplicate=False) if id(p) in found}
    return tied | stored


def _find(value: ir.Value, stored: Mapping[str, TensorInfo], checkpoint: Checkpoint) -> TensorInfo:
    name = str(value.name)
    if name not in stored:
        raise CheckpointError(f"{checkpoint.directory} has no tensor for {name}; is it a checkpoint of this config?")
    info, shape = stored[name], _shape(value)
    # a convolution over whole windows is a Gemm over the same bytes
    if shape not in (info.shape, (*info.shape[:1], math.prod(info.shape[1:]))):
        raise CheckpointError(
            f"{info.file}: {info.name} has shape {list(info.shape)}, the config asks for {list(shape)}; "
            "config.json and the weights are not of one model"
        )
    if info.torch_dtype not in _CONVERTIBLE:
        raise BundleError(
            f"{info.file}: {info.name} is {info.dtype}; only floating weights of 16 bits or more can be exported, "
            "so export from the checkpoint before quantisation"
        )
    return info


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return tuple(int(size) for size in value.shape)  # type: ignore[arg-type]


def _torch_dtype(value: ir.Value) -> torch.dtype:
    return next(dtype for dtype, ir_dtype in IR_DTYPES.items() if ir_dtype == value.dtype)


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
