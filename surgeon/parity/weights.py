"""Whether one loaded model holds another's tensors."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class WeightDifference:
    """A reference's tensors against those of a later form, by the names that the loaded models give them."""

    compared: int
    """Tensors, tied ones once."""
    changed: list[str]
    """With other values, or of another shape."""
    missing: list[str]
    rounded: list[str]
    """Equal only as the other's coarser dtype rounds them, which hides what is smaller."""


def compare_weights(
    reference: nn.Module, other: nn.Module, tables: Collection[str] = (), added_rows: Collection[int] = ()
) -> WeightDifference:
    """Every tensor of `reference` in `other`. Where the dtypes differ, the reference's values as the other's dtype
    rounds them. Tensors that `other` alone has are not looked at, and of the `tables`, by name, no rows of
    `added_rows`: `other` has as many rows more as these need."""
    expected, actual = reference.state_dict(), other.state_dict()
    for name in [name for name in tables if added_rows and name in actual and name in expected]:
        expected[name], actual[name] = _common_rows(expected[name], actual[name], added_rows)
    missing = [name for name in expected if name not in actual]
    changed = [name for name, tensor in expected.items() if name in actual and not _equal(tensor, actual[name])]
    tensors = {id(tensor) for tensor in reference.state_dict(keep_vars=True).values()}
    unchanged = [name for name in expected if name in actual and name not in changed]
    rounded = [name for name in unchanged if not torch.equal(expected[name], actual[name].to(expected[name].dtype))]
    return WeightDifference(len(tensors), changed, missing, rounded)


def _common_rows(expected: Tensor, actual: Tensor, added: Collection[int]) -> tuple[Tensor, Tensor]:
    """The rows that are not added ones, of both; of a table with another number of rows than it should have, all."""
    count = expected.shape[0]
    if actual.shape[0] != max(count, max(added) + 1):
        return expected, actual
    kept = torch.ones(count, dtype=torch.bool)
    kept[[row for row in added if row < count]] = False
    return expected[kept.to(expected.device)], actual[:count][kept.to(actual.device)]


def _equal(expected: Tensor, actual: Tensor) -> bool:
    if expected.shape != actual.shape:
        return False
    expected = expected.to(actual.device, actual.dtype).contiguous().flatten()
    # as bytes: NaN is equal to itself then, and zero has its sign
    return torch.equal(expected.view(torch.uint8), actual.contiguous().flatten().view(torch.uint8))


@torch.no_grad()
def take_weights(model: nn.Module, source: nn.Module) -> None:
    """Give `model`, in memory, the values of every tensor that `source` has too, of the same shapes; of a table that
    has more rows there, the first."""
    values = source.state_dict()
    for name, tensor in model.state_dict().items():
        if name in values:
            tensor.copy_(values[name][: len(tensor)] if tensor.ndim else values[name])
