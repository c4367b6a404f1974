"""Passes: their contract, the manager that runs and checks them, and their registry."""

import difflib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from surgeon.errors import OptionError, SurgeonError

# Whoever lists passes or makes them of a recipe needs no torch; whoever runs them has a graph, and loaded it for that.
if TYPE_CHECKING:
    from surgeon.graph import LvlmGraph


class PreconditionError(SurgeonError):
    """The graph is not one that this pass can rewrite: whoever wrote the recipe can mend it."""


class PostconditionError(SurgeonError):
    """A pass broke its promise: its author can mend it."""

    exit_code = 3


class PassCrash(SurgeonError):
    """A pass raised something of its own: its author can mend it."""

    exit_code = 3


class PassOptions(BaseModel):
    """A pass's options. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class PassResult:
    """`modified`: whether the graph is another one than before. `touched`: module paths that were added or changed."""

    modified: bool
    touched: list[str]


class Pass(ABC):
    """One rewrite of an LvlmGraph: `requires`, then `rewrite`, then `ensures`."""

    name: ClassVar[str]
    summary: ClassVar[str]
    Options: ClassVar[type[PassOptions]]
    identity: ClassVar[bool]
    """Whether the rewritten model gives bit for bit the source's logits until it is trained."""

    def __init__(self, options: Any) -> None:
        self.options = options

    def requires(self, graph: "LvlmGraph") -> None:
        """Raise PreconditionError, saying what was looked for, what is there, and what to write instead."""

    @abstractmethod
    def rewrite(self, graph: "LvlmGraph") -> PassResult: ...

    def ensures(self, graph: "LvlmGraph", result: PassResult) -> None:
        """Raise PostconditionError where the rewritten graph is not what this pass promises."""

    def resolved(self, graph: "LvlmGraph") -> dict[str, Any]:
        """The options with everything that depends on the graph made explicit: what the record and the recipe hold."""
        return self.options.model_dump(mode="json")


Registry = Mapping[str, type[Pass]]


def make_pass(registry: Registry, name: str, options: Mapping[str, Any]) -> Pass:
    """The pass of this name with these options. Raises OptionError with the nearest known name."""
    if name not in registry:
        raise OptionError(f"unknown pass {name!r}{nearest(name, list(registry))}")
    pass_class = registry[name]
    try:
        return pass_class(pass_class.Options(**options))
    except ValidationError as error:
        raise OptionError(f"pass {name}: {_explain(error, pass_class)}") from error


def nearest(word: str, choices: Sequence[str]) -> str:
    """`; did you mean ...?` or the list of what there is."""
    close = difflib.get_close_matches(word, choices, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(choices)}"


def _explain(error: ValidationError, pass_class: type[Pass]) -> str:
    # an option that is misspelt is why another is missing
    first = min(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
    option = ".".join(str(part) for part in first["loc"][:1])
    if first["type"] == "extra_forbidden":
        return f"unknown option {option!r}{nearest(option, list(pass_class.Options.model_fields))}"
    if first["type"] == "missing":
        return f"option {option!r} is required ({pass_class.Options.model_fields[option].description})"
    message = str(first["msg"].removeprefix("Value error, "))
    return f"option {option!r}: {message}" if option else message  # of several options together


def run_passes(graph: "LvlmGraph", passes: Sequence[Pass]) -> list[PassResult]:
    """Run the passes in order on `graph`, in place, checking the graph after each.

    Raises PreconditionError, PostconditionError, PassCrash.
    """
    results = []
    for pass_ in passes:
        try:
            pass_.requires(graph)
            resolved = pass_.resolved(graph)
            check_replay(graph, pass_, resolved)
            result = pass_.rewrite(graph)
            if result.modified:
                graph.record = {**graph.record, "passes": [*graph.record["passes"], {pass_.name: resolved}]}
                graph.sync_record()
            pass_.ensures(graph, result)
        except SurgeonError:
            raise
        except Exception as error:
            raise PassCrash(f"pass {pass_.name} crashed: {type(error).__name__}: {error}") from error
        check(graph, pass_)
        results.append(result)
    return results


def check_replay(graph: "LvlmGraph", pass_: Pass, resolved: dict[str, Any]) -> None:
    """What the record and the recipe will hold must give the same pass again: written and read, `resolved` is accepted
    as the pass's options, and they resolve to themselves. Raises PostconditionError."""

    def fail(why: str) -> PostconditionError:
        return PostconditionError(f"pass {pass_.name} would record options that do not replay: {why}")

    reloaded = yaml.safe_load(yaml.safe_dump(resolved))
    if not reloaded == resolved == json.loads(json.dumps(resolved)):
        raise fail(f"{resolved} are read back as {reloaded}")
    try:
        again = type(pass_)(pass_.Options(**reloaded))
        again.requires(graph)
    except ValidationError as error:
        raise fail(_explain(error, type(pass_))) from error
    except PreconditionError as error:
        raise fail(str(error)) from error
    if (replayed := again.resolved(graph)) != resolved:
        option = next(key for key in [*resolved, *replayed] if resolved.get(key) != replayed.get(key))
        raise fail(f"option {option!r} is {resolved.get(option)!r}, and then {replayed.get(option)!r}")


def check(graph: "LvlmGraph", pass_: Pass) -> None:
    """What holds after any pass: one source per parameter, of its shape and dtype; a config that round-trips; and,
    where the pass promises identity, a zero gate in front of everything new. Raises PostconditionError."""
    from surgeon.memory.inserted import Constant
    from surgeon.weights import Initialised, Tied

    def fail(defect: str) -> PostconditionError:
        return PostconditionError(f"pass {pass_.name} left a broken graph: {defect}")

    state = graph.model.state_dict()
    for name in sorted(state.keys() ^ graph.weights.keys()):
        raise fail(f"{name} has {'no source' if name in state else 'a source but no place'}")
    for name, source in graph.weights.items():
        if isinstance(source, Tied):
            continue
        if source.shape != tuple(state[name].shape):
            raise fail(f"{name} is {list(state[name].shape)}, its source {list(source.shape)}")
        if isinstance(source, Initialised) and source.dtype != graph.dtype:
            raise fail(f"{name} is initialised as {source.dtype}, the checkpoint is {graph.dtype}")
    if type(graph.config).from_dict(graph.config.to_dict()).to_dict() != graph.config.to_dict():
        raise fail("the config does not survive being written and read")
    if pass_.identity:
        for path, module in graph.grafts().items():
            for gate in module.gates:
                source = graph.weights[f"{path}.{gate}"]
                if isinstance(source, Initialised) and source.initialiser != Constant(0.0):
                    raise fail(f"{path}.{gate} is a gate and does not start at zero")
