"""Whether a patched config's record is what its recorded passes make of its source: closed gates hide every option."""

from typing import Any

import torch

from surgeon.checkpoint import Checkpoint
from surgeon.errors import SurgeonError
from surgeon.graph import LvlmGraph
from surgeon.memory.patched import RECORD
from surgeon.models import read_model
from surgeon.parity.settings import differences
from surgeon.patch import plan
from surgeon.pipeline import Registry
from surgeon.recipe import Recipe
from surgeon.weights import Stored, Tied

_NOT_OF_PASSES = ("version", "source")


def compare_record(
    source: Checkpoint, patched: Checkpoint, registry: Registry, rows_tuned: bool = False
) -> list[str] | None:
    """How the record of `patched` differs from what its passes leave when run on the config of `source`, in words; and,
    unless they may be tuned (`rows_tuned`), the rows of its new tokens from what the passes make them. None where the
    record does not say that passes made it from `source`, as for an imported checkpoint."""
    before, after = (_record(each).get("passes", []) for each in (source, patched))
    if after[: len(before)] != before or len(after) == len(before):
        return None
    try:
        graph, _ = plan(source, Recipe(passes=after[len(before) :]).make_passes(registry))
    except SurgeonError as error:
        return [f"config.json: the passes that {patched.directory} records do not apply to {source.directory}: {error}"]
    replayed, recorded = (
        {k: v for k, v in record.items() if k not in _NOT_OF_PASSES} for record in (graph.record, _record(patched))
    )
    failures = [] if rows_tuned else _other_rows(graph, source, patched)
    return failures + [
        f"config.json: {name} is {b!r} in {patched.directory}, and its recorded passes make it {a!r}"
        for name, a, b in differences(_by_number(replayed), _by_number(recorded), RECORD)
    ]


def _other_rows(graph: LvlmGraph, source: Checkpoint, patched: Checkpoint) -> list[str]:
    """Rows of new tokens that are not what the passes make them: one line for each table."""
    failures: list[str] = []
    tables = graph.extended_tables()
    written = read_model(patched).weights if tables else {}
    for name, table in tables.items():
        stored = written[name]
        while isinstance(stored, Tied):
            stored = written[stored.name]
        assert isinstance(stored, Stored)
        if stored.shape != table.shape:
            failures.append(f"{name} has {stored.shape[0]} rows, and the recorded passes give it {table.shape[0]}")
            continue
        actual = patched.read(stored.key)[[each.row for each in table.rows]]
        patched.release(stored.key)
        expected = table.new_rows(source).to(actual.dtype)
        other = [each for each, a, b in zip(table.rows, expected, actual, strict=True) if not torch.equal(a, b)]
        if other:
            more = f" and {len(other) - 1} more" if len(other) > 1 else ""
            failures.append(
                f"row {other[0].row} of {name}, of the token {other[0].token!r}{more}, is not what the recorded passes "
                "make it; where tokens were trained, say so with --grafts-tuned or --backbone-tuned"
            )
    return failures


def _record(checkpoint: Checkpoint) -> dict[str, Any]:
    return checkpoint.config.get(RECORD) or {}


def _by_number(record: dict[str, Any]) -> dict[str, Any]:
    """With the grafts by their number, so that a difference names the option."""
    return {**record, "grafts": {str(number): entry for number, entry in enumerate(record["grafts"])}}
