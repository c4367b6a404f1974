"""What a patched config records of its grafts, and the classes of their kinds."""

from typing import Any

from transformers import PretrainedConfig

from surgeon.discovery import Extensions
from surgeon.errors import CheckpointError
from surgeon.memory.graft import Graft
from surgeon.memory.patched import RECORD

_GRAFTS = Extensions("surgeon.memory", "GRAFT", group="surgeon.grafts")


def graft_class(kind: str) -> type[Graft]:
    """The graft class of a kind. Raises CheckpointError where there is none."""
    graft: type[Graft] | None = _GRAFTS.get(kind)
    if graft is None and _GRAFTS.has_file(kind):
        raise CheckpointError(f"surgeon/memory/{kind}.py has no GRAFT, by which a kind of graft is known")
    if graft is None:
        raise CheckpointError(
            f"the checkpoint holds grafts of kind {kind!r}, which this version does not know; use a newer one, or "
            "install the package that brings them"
        )
    if graft.kind != kind:
        raise CheckpointError(f"the graft of the file {kind}.py is of kind {graft.kind!r}: they are named alike")
    return graft


def is_patched(config: PretrainedConfig) -> bool:
    """Whether a config asks for a patched model: one with grafts, or with positions of its own."""
    return asks_for_patched_class(getattr(config, RECORD, None))


def asks_for_patched_class(record: Any) -> bool:
    """Whether the model of a record is another class than the family's own. With new tokens alone it is not: they are
    rows of its tables."""
    return isinstance(record, dict) and bool(record.get("grafts") or record.get("positions"))


def graft_records(config: PretrainedConfig) -> list[dict[str, Any]]:
    """The grafts that a config records: `{"kind", "layers", ...options}` each; none for a plain model."""
    return list((getattr(config, RECORD, None) or {}).get("grafts", []))
