"""How a foreign layout reads: the config it becomes, and a rule for each of its tensors."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

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


@dataclass
class Layout:
    """A foreign checkpoint, read: what it becomes."""

    config: dict[str, Any]
    """config.json in transformers' layout, of the model without grafts."""
    rules: list[Rule]
    text_model: str
    """The kind of text model inside, as the source calls it."""
    image_processor: dict[str, Any]
    """preprocessor_config.json."""
    template: str | None
    """Name of the conversation template that it was trained with."""
    record: dict[str, Any] | None = None
    """The config record of a grafted model; None for a plain one."""
    warnings: list[str] = field(default_factory=list)


ReadLayout = Callable[[dict[str, Any], int], Layout]
"""(config.json, image token id) -> its layout. Raises CheckpointError for what cannot be converted exactly."""


def setting(config: Mapping[str, Any], key: str, kind: type[T], where: str = "config.json") -> T:
    """A config value that must be there and of its kind. Raises CheckpointError."""
    found = config.get(key)
    if kind is float and type(found) is int:
        found = float(found)
    if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
        what = "is missing" if found is None else f"is {found!r}"
        raise CheckpointError(f"{key} {what} in {where}, where a {kind.__name__} is needed")
    return found
