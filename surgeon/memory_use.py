"""What a caller wants of memory that the model calls for itself, for any form of a model."""

from typing import Any

from surgeon.errors import OptionError
from surgeon.memory.invoking_generation import Settings
from surgeon.memory.memory_tokens import MAX_INVOCATIONS, MODES, MemoryTokens, Mode

__all__ = ["MAX_INVOCATIONS", "MODES", "MemoryTokens", "Mode", "memory_settings", "memory_tokens_of"]


def memory_tokens_of(record: dict[str, Any]) -> MemoryTokens | None:
    """Those of a model, by its config's record; None where it calls for no memory."""
    return MemoryTokens.of(record["vismem"]) if record.get("vismem") else None


def memory_settings(
    tokens: MemoryTokens | None, mode: Mode | None, max_invocations: int | None, *, name: str = "this model"
) -> Settings:
    """What is asked for, checked; by default `auto`. Raises OptionError for a model that cannot do it."""
    if tokens is None and (mode == "always" or max_invocations is not None):
        raise OptionError(
            f"{name} has no memory that it could call for: patch a checkpoint with --pass memory-tokens --pass vismem, "
            "or leave --memory out"
        )
    try:
        return Settings.of("off" if tokens is None else mode or "auto", max_invocations)
    except ValueError as error:
        raise OptionError(str(error)) from error
