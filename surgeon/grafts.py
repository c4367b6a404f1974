"""What a patched config records of its grafts, and the classes of their kinds."""

import importlib
from typing import Any

from transformers import PretrainedConfig

from surgeon.errors import CheckpointError
from surgeon.memory.graft import Graft
from surgeon.memory.patched import RECORD


def graft_class(kind: str) -> type[Graft]:
    """The graft class of a kind: the `GRAFT` of `surgeon/memory/<kind>.py`."""
    try:
        found: type[Graft] = importlib.import_module(f"surgeon.memory.{kind}").GRAFT
    except (ModuleNotFoundError, AttributeError) as error:
        raise CheckpointError(
            f"the checkpoint holds grafts of kind {kind!r}, which this version does not know; use a newer one"
        ) from error
    return found


def is_patched(config: PretrainedConfig) -> bool:
    """Whether a config asks for a patched model: one with grafts, or with positions of its own."""
    return bool(getattr(config, RECORD, None))


def grafts_of(config: PretrainedConfig) -> list[dict[str, Any]]:
    """The grafts that a config records: `{"kind", "layers", ...options}` each; none for a plain model."""
    return list((getattr(config, RECORD, None) or {}).get("grafts", []))
