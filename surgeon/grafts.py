"""What a patched config records of its grafts, and the classes of their kinds."""

from typing import Any

from transformers import PretrainedConfig

from surgeon.discovery import Extensions
from surgeon.errors import CheckpointError
from surgeon.families import Family
from surgeon.memory.graft import Graft
from surgeon.memory.invoking import invoking_base_model_class, invoking_model_class
from surgeon.memory.patched import RECORD, patched_base_model_class, patched_model_class

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
    """Whether a config asks for a patched model: one with grafts, with positions of its own, or memory to call for."""
    return asks_for_patched_class(getattr(config, RECORD, None))


def asks_for_patched_class(record: Any) -> bool:
    """Whether the model of a record is another class than the family's own. With new tokens alone it is not: they are
    rows of its tables."""
    return isinstance(record, dict) and any(record.get(key) for key in ("grafts", "positions", "vismem"))


def graft_records(config: PretrainedConfig) -> list[dict[str, Any]]:
    """The grafts that a config records: `{"kind", "layers", ...options}` each; none for a plain model."""
    return list((getattr(config, RECORD, None) or {}).get("grafts", []))


def model_parts(described: Family, record: dict[str, Any]) -> tuple[type, ...]:
    """What a patched model's class is made of beside its own: the classes of its grafts, and where it calls for memory
    the tower that it looks through again."""
    grafts = [graft_class(kind) for kind in sorted({entry["kind"] for entry in record["grafts"]})]
    looks_again = (record.get("vismem") or {}).get("short_former") == "vision"
    return (*grafts, described.tower) if looks_again and described.tower is not None else tuple(grafts)


def class_makers(record: dict[str, Any]) -> tuple[Any, Any]:
    """The functions that make a patched model's class and its base model's."""
    if record.get("vismem"):
        return invoking_model_class, invoking_base_model_class
    return patched_model_class, patched_base_model_class
