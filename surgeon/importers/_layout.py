"""What an importer is, and what it reads of a foreign layout: the config it becomes, a rule for each of its tensors,
and who writes the files beside them."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch

from surgeon.checkpoint.reader import Checkpoint
from surgeon.errors import CheckpointError

Take = Callable[[torch.Tensor], torch.Tensor]
"""The part of a source tensor that one target tensor is. Also works on the meta device, which gives the shape."""

T = TypeVar("T")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def rows(index: int, count: int) -> Take:
    """The `index`-th of `count` equal parts of the first dimension."""
    return lambda tensor: tensor.unflatten(0, (count, -1))[index]


@dataclass(frozen=True)
class Rule:
    """Where the tensors go whose whole name matches `pattern`: target names, which may refer to its groups."""

    pattern: re.Pattern[str]
    targets: Mapping[str, Take]


def rule(pattern: str, targets: str | Mapping[str, Take]) -> Rule:
    """A rule with one target, with several, or (an empty mapping) for tensors that the target computes itself."""
    return Rule(re.compile(pattern), {targets: whole} if isinstance(targets, str) else targets)


class SideFiles(Protocol):
    """What stands beside the weights and config.json: tokenizer, chat template, image processor, licence."""

    def write(self, directory: Path, config: dict[str, Any]) -> list[str]:
        """Write them for a target whose config.json is `config`; -> warnings. Raises CheckpointError for a tokenizer
        that cannot be had exactly."""


@dataclass
class Layout:
    """A foreign checkpoint, read: what it becomes."""

    config: dict[str, Any]
    """config.json in transformers' layout, of the model without grafts."""
    rules: list[Rule]
    text_model: str
    """The kind of text model inside, as the source calls it."""
    side_files: SideFiles
    image_token_id: int
    record: dict[str, Any] | None = None
    """The config record of a grafted model; None for a plain one."""
    warnings: list[str] = field(default_factory=list)


class Importer(ABC):
    """One foreign layout. Its file has an instance, `IMPORTER`."""

    model_type: ClassVar[str]
    """The `model_type` of its config.json."""

    def recognises(self, config: Mapping[str, Any], tensors: Collection[str]) -> bool:
        """Whether a checkpoint is of this layout, by its config.json and its tensors' names (a config alone has none).
        A layout that shares its model_type with another one tells them apart here."""
        return config.get("model_type") == self.model_type

    @abstractmethod
    def read(self, source: Checkpoint, image_token_id: int | None = None) -> Layout:
        """The layout of a checkpoint that `recognises` took. `image_token_id`: as asked for, None where it was not.

        Raises CheckpointError for what cannot be converted exactly, OptionError for a token id that cannot be.
        """


def setting(config: Mapping[str, Any], key: str, kind: type[T], where: str = "config.json") -> T:
    """A config value that must be there and of its kind. Raises CheckpointError."""
    value = config.get(key)
    if kind is float and type(value) is int:
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        problem = "is missing" if value is None else f"is {value!r}"
        raise CheckpointError(f"{key} {problem} in {where}, where a {kind.__name__} is needed")
    return value
