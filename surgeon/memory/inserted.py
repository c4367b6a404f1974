"""What passes insert into a model: modules that know their own values at insertion."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn


@dataclass(frozen=True)
class Normal:
    """Drawn from a normal distribution around zero."""

    std: float


@dataclass(frozen=True)
class Constant:
    value: float


Initialiser = Normal | Constant


class Inserted(nn.Module, ABC):
    """A module that a pass inserts."""

    kind: ClassVar[str]
    """Its name: the attribute of the module that holds it, and the name of its file."""
    gates: ClassVar[tuple[str, ...]]
    """The parameters that are zero at insertion and keep it from changing anything; none of what acts only when it is
    called."""

    @abstractmethod
    def initialisers(self, std: float) -> dict[str, Initialiser]:
        """Parameter name -> its value at insertion. `std`: the backbone's initializer_range."""

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        """Set every parameter to its value at insertion, in place."""
        for name, initialiser in self.initialisers(std).items():
            parameter = self.get_parameter(name)
            match initialiser:
                case Normal(std=scale):
                    parameter.normal_(0.0, scale)
                case Constant(value=value):
                    parameter.fill_(value)
