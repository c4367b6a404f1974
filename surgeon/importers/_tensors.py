"""Which target tensor is which part of which source tensor, planned from shapes alone; then written as a stream."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from surgeon.checkpoint.headers import TensorInfo
from surgeon.checkpoint.reader import INDEX, SINGLE, Checkpoint
from surgeon.checkpoint.writer import PlannedTensor, write_safetensors
from surgeon.errors import CheckpointError
from surgeon.importers._layout import Rule, Take

_CHUNK = 1 << 24


@dataclass(frozen=True)
class Converted:
    """One tensor of the target."""

    name: str
    source: TensorInfo
    take: Take
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.source.torch_dtype.itemsize


def plan_tensors(
    tensors: Mapping[str, TensorInfo], rules: Iterable[Rule], expected: Mapping[str, tuple[int, ...]]
) -> list[Converted]:
    """The target's tensors, in the order of the source's.

    `expected`: the shape of every tensor that the target has. Raises CheckpointError, with the name, for a source
    tensor that has no place in the target, that is of another shape than the config says, and for a target tensor that
    nothing becomes.
    """
    planned: dict[str, Converted] = {}
    for name, info in tensors.items():
        for target in _targets(name, info, rules):
            if target.name not in expected:
                raise _leftover(name, info)
            if target.shape != expected[target.name]:
                raise CheckpointError(
                    f"{name} is {list(info.shape)}, which makes {target.name} {list(target.shape)}, where config.json "
                    f"asks for {list(expected[target.name])}"
                )
            if target.name in planned:
                raise CheckpointError(f"{name} and {planned[target.name].source.name} are both {target.name}")
            planned[target.name] = target
    missing = sorted(set(expected) - set(planned))
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"the checkpoint has no tensor for {', '.join(missing[:3])}{more}, which its config.json asks for"
        )
    return list(planned.values())


def _targets(name: str, info: TensorInfo, rules: Iterable[Rule]) -> list[Converted]:
    for rule in rules:
        if not (match := rule.pattern.fullmatch(name)):
            continue
        converted = []
        for template, take in rule.targets.items():
            try:
                shape = take(torch.empty(info.shape, dtype=info.torch_dtype, device="meta")).shape
            except RuntimeError:  # it does not divide as the config says
                raise CheckpointError(
                    f"{name} is {list(info.shape)}, which does not divide into the heads that config.json names"
                ) from None
            converted.append(Converted(match.expand(template), info, take, tuple(shape)))
        return converted
    raise _leftover(name, info)


def _leftover(name: str, info: TensorInfo) -> CheckpointError:
    return CheckpointError(
        f"tensor {name} {list(info.shape)} has no place in the converted model: the checkpoint is not what its "
        "config.json says, or has parts that cannot be converted"
    )


def write_tensors(
    source: Checkpoint, planned: list[Converted], directory: Path, progress: Callable[[str, int, int], None] | None
) -> int:
    """Write the target's weight files, one for each of the source's and named alike. Returns the bytes written.

    One tensor is in memory at a time; the source's pages are given back as soon as they were used.
    """
    total, done, bytes_written = sum(converted.nbytes for converted in planned), 0, 0
    last: str | None = None

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress("weights", done, total)

    def planned_tensor(converted: Converted) -> PlannedTensor:
        def make() -> torch.Tensor:
            nonlocal last
            if last is not None and last != converted.source.name:
                source.release(last)
            last = converted.source.name
            return converted.take(source.read(last))

        return PlannedTensor(converted.name, converted.source.torch_dtype, converted.shape, make)

    weight_map: dict[str, str] = {}
    for file in source.files:
        tensors = [planned_tensor(converted) for converted in planned if converted.source.file == file]
        if not tensors:
            continue
        name = str(file.relative_to(source.directory))
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        bytes_written += write_safetensors(directory / name, tensors, progress=report)
        weight_map |= {tensor.name: name for tensor in tensors}
    if set(weight_map.values()) != {SINGLE}:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        bytes_written += (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return bytes_written


def equal(source: Checkpoint, first: str, second: str) -> bool:
    """Whether two tensors of a checkpoint hold the same bytes."""
    a, b = (source.read(name).reshape(-1).view(torch.uint8) for name in (first, second))
    same = a.numel() == b.numel() and all(
        torch.equal(x, y) for x, y in zip(a.split(_CHUNK), b.split(_CHUNK), strict=True)
    )
    for name in (first, second):
        source.release(name)
    return same
