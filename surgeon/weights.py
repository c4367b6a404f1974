"""The weight plan: where every parameter of a graph gets its values from. Nothing is read to make one."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from surgeon.memory.graft import Constant, Initialiser, Normal


@dataclass(frozen=True)
class Stored:
    """A tensor of the source checkpoint, as it is."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Initialised:
    """New values, a function of the seed and the parameter's name alone: not of the order of passes, nor of cores."""

    initialiser: Initialiser
    seed: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def values(self, name: str) -> torch.Tensor:
        """The tensor of this plan for the parameter `name`."""
        match self.initialiser:
            case Constant(value=value):
                return torch.full(self.shape, value, dtype=self.dtype)
            case Normal(std=std):
                key = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()[:16]
                generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
                drawn = generator.standard_normal(self.shape, dtype=np.float32) * np.float32(std)
                return torch.from_numpy(drawn).to(self.dtype)


@dataclass(frozen=True)
class Tied:
    """The same tensor as another parameter's."""

    name: str


WeightSource = Stored | Initialised | Tied
WeightPlan = dict[str, WeightSource]
