"""Tile configs as they were measured best on a GPU, kept in a file per GPU (`autotune` measures). Without a file, and
for sizes that are not in it, tile configs follow the rule of `tile_config.py`."""

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from exporters.kernels.folder import folder
from exporters.kernels.kernel import Step, TileConfig, power_of_two
from exporters.kernels.plan import ChooseTileConfig, TensorType, heuristic
from surgeon.checkpoint import staged_file

_FORMAT = 1
_MOST = {"num_warps": 32, "num_stages": 16}
"""Of each field of `TileConfig` that no larger launch can have; of the others no tile is as large as 2^16."""
Kept = dict[str, TileConfig]


@dataclass(frozen=True)
class Measured:
    """A launch, measured. Where its tile configs change the inputs of later launches, the times include those."""

    tile_config: TileConfig
    seconds: float
    rule_seconds: float
    """By the rule's tile configs."""
    tried: int


# -- choosing --------------------------------------------------------------------------------------------------------
def choose(step: Step, inputs: Mapping[str, TensorType]) -> TileConfig:
    """As measured on the current GPU, where it was."""
    if not torch.cuda.is_available():
        return heuristic(step, inputs)
    return chooser(read(_gpu_name(torch.cuda.current_device())))(step, inputs)


def chooser(kept: Mapping[str, TileConfig], used: set[str] | None = None) -> ChooseTileConfig:
    """Tile configs from `kept`, and the heuristic's for launches that are not in it. `used`: a set to which the names
    of those taken are added."""
    if not kept:
        return heuristic

    def chosen(step: Step, inputs: Mapping[str, TensorType]) -> TileConfig:
        name = key(step, inputs)
        if name not in kept:
            return heuristic(step, inputs)
        if used is not None:
            used.add(name)
        return kept[name]

    return chosen


def key(step: Step, inputs: Mapping[str, TensorType]) -> str:
    """A launch's name among measurements: weights by their sizes, the rest rounded up to powers of two, because
    batches, lengths and memories differ from one request to the next. Masks, which cost next to nothing and which one
    runtime gives where another does not, are left out."""
    parts = [step.name]
    for name, tensor in inputs.items():
        if len(tensor.shape) == 1 or tensor.dtype in ("bool", "int32"):
            continue
        sizes = tensor.shape if len(tensor.shape) == 2 else tuple(power_of_two(size) for size in tensor.shape)
        parts.append(f"{name}={tensor.dtype}[{','.join(map(str, sizes))}]")
    return " ".join(parts)


@cache
def _gpu_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


# -- keeping ---------------------------------------------------------------------------------------------------------
def path_of(gpu: str) -> Path:
    """The file of a GPU, by its name: "NVIDIA H200"."""
    return folder() / f"{slug(gpu)}.json"


def slug(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


@cache
def read(gpu: str) -> Kept:
    """The tile configs that were kept for a GPU, empty without a file. A file that cannot be used is reported once."""
    path = path_of(gpu)
    try:
        tuned = load(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"{path} is ignored: {error}; measure again, or delete it", stacklevel=2)
        return {}
    if tuned.gpu != gpu:
        warnings.warn(
            f"{path} is ignored: it is for {tuned.gpu!r}, not {gpu!r}; measure again, or delete it", stacklevel=2
        )
        return {}
    return tuned.tile_configs


@dataclass(frozen=True)
class Tuned:
    """What was measured on a GPU."""

    gpu: str
    tile_configs: Kept


_FORMER, _FORMER_INPUT = "blocks", re.compile(r"\bonto=")
"""What `tile_config` was called in files of earlier versions, and the input `residual` in the names of launches."""


def load(path: Path) -> Tuned:
    """A file that `keep` wrote, wherever it lies. Raises OSError, and ValueError for what is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"it is of format {content['format']!r}, not {_FORMAT}")
        launches = content["launches"]
        if any(_FORMER in launch for launch in launches.values()):
            warnings.warn(
                f"{path} is of an earlier version: it is read for this release, so measure again", stacklevel=2
            )
        configs = dict(_tile_config_of(name, launch) for name, launch in launches.items())
        return Tuned(str(content["gpu"]), configs)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"it is no file of measured tile configs ({type(error).__name__}: {error})") from error


def _tile_config_of(name: str, launch: Mapping[str, Any]) -> tuple[str, TileConfig]:
    """A launch of a file, with the name that it has now."""
    name = _FORMER_INPUT.sub("residual=", name) if _FORMER in launch else name
    return name, _sound(launch.get(_FORMER) or launch["tile_config"])


def _sound(values: Mapping[str, Any]) -> TileConfig:
    tile_config = TileConfig(**values)
    for field in fields(TileConfig):
        value = getattr(tile_config, field.name)
        least = 16 if field.name in ("inner", "slots") or (field.name == "outputs" and tile_config.tokens > 1) else 1
        powers = field.name != "num_stages"
        most = _MOST.get(field.name, 1 << 16)
        if type(value) is not int or not least <= value <= most or (powers and value & (value - 1)):
            raise ValueError(f"{field.name} is {value!r}")
    if 1 < tile_config.tokens < 16:
        raise ValueError(f"tokens is {tile_config.tokens}")
    return tile_config


def keep(gpu: str, triton_version: str, measurements: Mapping[str, "Measured"]) -> Path:
    """Add measurements to a GPU's file -> the file. Raises TargetError where it cannot be written."""
    path = path_of(gpu)
    launches = {name: {"tile_config": asdict(tile_config)} for name, tile_config in read(gpu).items()}
    launches |= {name: asdict(measurement) for name, measurement in measurements.items()}
    content = {"format": _FORMAT, "gpu": gpu, "triton": triton_version, "launches": dict(sorted(launches.items()))}
    with staged_file(path, overwrite=True) as file:
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    from exporters.kernels.launch import clear_cache

    read.cache_clear()
    clear_cache()
    return path
