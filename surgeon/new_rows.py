"""New rows of a token table: what their values are, a function of the source's table, the seed and the token's text."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

NOISE = 1e-3
"""Standard deviation of what is added to the rule's row, as a share of its root mean square: new rows differ by it."""
_CHUNK = 32 << 20


@dataclass(frozen=True)
class MeanOfRows:
    """The mean of the source's rows of these ids, `(first, end)` each."""

    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class CopyOfRow:
    """The source's row of this id."""

    row: int


RowRule = MeanOfRows | CopyOfRow


@dataclass(frozen=True)
class NewRow:
    """Where a new token's row goes in its table, and how it is made."""

    token: str
    row: int
    rule: RowRule
    seed: int


def new_row_values(
    name: str, rows: Sequence[NewRow], table: torch.Tensor, release: Callable[[], None] = lambda: None
) -> torch.Tensor:
    """The values of `rows`, [N, d] in the table's dtype, in their order.

    name: the parameter's, a part of the noise's key. table: the source's, [V, d]; only rows that a rule names are read.
    `release` is called between chunks of it. The result depends neither on the machine nor on its cores.
    """
    rule_rows = {rule: _rule_row(rule, table, release) for rule in dict.fromkeys(each.rule for each in rows)}
    spreads = {rule: NOISE * _root_mean_square(values) for rule, values in rule_rows.items()}
    new_values = np.empty((len(rows), table.shape[1]), dtype=np.float32)
    for number, each in enumerate(rows):
        noise = _generator(each.seed, name, each.token).standard_normal(table.shape[1], dtype=np.float32)
        new_values[number] = rule_rows[each.rule] + spreads[each.rule] * noise.astype(np.float64)
    return torch.from_numpy(new_values).to(table.dtype)


def _generator(seed: int, name: str, token: str) -> np.random.Generator:
    key = hashlib.sha256(f"{seed}:{name}:{token}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def _rule_row(rule: RowRule, table: torch.Tensor, release: Callable[[], None]) -> np.ndarray:
    """fp64 [d]."""
    match rule:
        case CopyOfRow(row=row):
            return table[row].to(torch.float64).numpy()
        case MeanOfRows(spans=spans):
            total, count = np.zeros(table.shape[1]), 0
            step = max(1, _CHUNK // (table.shape[1] * 8))
            for first, end in spans:
                for start in range(first, end, step):
                    chunk = table[start : min(start + step, end)].to(torch.float64).numpy()
                    total += chunk.sum(axis=0)  # row after row: no order that depends on the machine
                    count += len(chunk)
                    release()
            return total / count


def _root_mean_square(values: np.ndarray) -> float:
    return math.sqrt(math.fsum((values * values).tolist()) / len(values))
