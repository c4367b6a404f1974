"""Who sees a picture in the memory: the option that passes which graft have in common."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from surgeon.pipeline import PreconditionError

if TYPE_CHECKING:
    from surgeon.graph import LvlmGraph

Visibility = Literal["causal", "all"]


def visibility_field() -> Any:
    return Field(
        default=None,
        description="which tokens see a picture in the memory: causal (those behind it) or all (as published); by "
        "default that of the checkpoint's other grafts, else causal",
    )


def resolve_visibility(choice: Visibility | None, graph: "LvlmGraph", pass_name: str) -> Visibility:
    """The visibility to record. Raises PreconditionError where the checkpoint's other grafts have another."""
    grafts = graph.record["grafts"]
    if not grafts:
        return choice or "causal"
    recorded: Visibility = grafts[-1].get("visibility", "all")
    if choice not in (None, recorded):
        raise PreconditionError(
            f"pass {pass_name}: visibility={choice}, but the {grafts[-1]['kind']} grafts of this checkpoint have "
            f"visibility={recorded}, and grafts of one model read one memory; leave visibility out, or patch the "
            "unpatched checkpoint"
        )
    return recorded
