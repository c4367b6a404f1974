"""Whether a patched config's record is what its recorded passes make of its source: closed gates hide every option."""

from typing import Any

from surgeon.checkpoint import Checkpoint
from surgeon.errors import SurgeonError
from surgeon.memory.patched import RECORD
from surgeon.parity.settings import differences
from surgeon.patch import plan
from surgeon.pipeline import Registry
from surgeon.recipe import Recipe

_NOT_OF_PASSES = ("version", "source")


def compare_record(source: Checkpoint, patched: Checkpoint, registry: Registry) -> list[str] | None:
    """How the record of `patched` differs from what its passes leave when run on the config of `source`, in words. None
    where the record does not say that passes made it from `source`, as for an imported checkpoint."""
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
    return [
        f"config.json: {name} is {b!r} in {patched.directory}, and its recorded passes make it {a!r}"
        for name, a, b in differences(_by_number(replayed), _by_number(recorded), RECORD)
    ]


def _record(checkpoint: Checkpoint) -> dict[str, Any]:
    return checkpoint.config.get(RECORD) or {}


def _by_number(record: dict[str, Any]) -> dict[str, Any]:
    """With the grafts by their number, so that a difference names the option."""
    return {**record, "grafts": {str(number): entry for number, entry in enumerate(record["grafts"])}}
