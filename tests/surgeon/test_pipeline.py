"""The pass manager: three kinds of errors, and the checks after every pass."""

import copy
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import passes
from checkpoints import tiny_checkpoint
from passes.pvm import PvmOptions, PvmPass
from surgeon.checkpoint.reader import Checkpoint
from surgeon.graph import LvlmGraph
from surgeon.memory.inserted import Constant, Normal
from surgeon.pipeline import (
    Pass,
    PassCrash,
    PassOptions,
    PassResult,
    PostconditionError,
    PreconditionError,
    run_passes,
)
from surgeon.weights import Initialised


@pytest.fixture
def graph(tmp_path: Path) -> LvlmGraph:
    return LvlmGraph.read(Checkpoint.open(tiny_checkpoint(tmp_path / "source", "qwen3_vl")))


class Nothing(Pass):
    name, summary, Options, identity = "nothing", "changes nothing", PassOptions, True
    seen: ClassVar[list[str]] = []

    def rewrite(self, graph: LvlmGraph) -> PassResult:
        return PassResult(modified=False, touched=[])


def test_an_unmodified_graph_leaves_no_record(graph: LvlmGraph) -> None:
    assert run_passes(graph, [Nothing(PassOptions())]) == [PassResult(False, [])]
    assert graph.record == {"grafts": [], "passes": []}


def test_a_crash_names_the_pass(graph: LvlmGraph) -> None:
    class Crashing(Nothing):
        def rewrite(self, graph: LvlmGraph) -> PassResult:
            raise ZeroDivisionError("oh")

    with pytest.raises(PassCrash, match="pass nothing crashed: ZeroDivisionError: oh"):
        run_passes(graph, [Crashing(PassOptions())])


def test_preconditions_come_before_any_change(graph: LvlmGraph) -> None:
    with pytest.raises(PreconditionError):
        run_passes(graph, [PvmPass(PvmOptions(layers=[99], latent=32))])
    assert graph.record["grafts"] == [] and not graph.grafts()


class Broken(PvmPass):
    def rewrite(self, graph: LvlmGraph) -> PassResult:
        result = super().rewrite(graph)
        self.damage(graph, "model.language_model.layers.1.pvm.alpha")
        return result

    def damage(self, graph: LvlmGraph, name: str) -> None: ...


def test_what_a_broken_pass_leaves_is_found(graph: LvlmGraph) -> None:
    options = PvmOptions(layers=[1], latent=32)

    class NoSource(Broken):
        def damage(self, graph: LvlmGraph, name: str) -> None:
            del graph.weights[name]

    class WrongShape(Broken):
        def damage(self, graph: LvlmGraph, name: str) -> None:
            graph.weights[name] = Initialised(Normal(1.0), 0, (2,), graph.dtype)

    class OpenGate(Broken):
        def damage(self, graph: LvlmGraph, name: str) -> None:
            graph.weights[name] = Initialised(Normal(1.0), 0, (1,), graph.dtype)

    class WrongDtype(Broken):
        def damage(self, graph: LvlmGraph, name: str) -> None:
            graph.weights[name] = Initialised(Constant(0.0), 0, (1,), torch.float64)

    for broken, message in (
        (WrongDtype, "initialised as torch.float64"),
        (NoSource, "no source"),
        (WrongShape, r"\[1\], its source \[2\]"),
        (OpenGate, "is a gate"),
    ):
        fresh = copy.deepcopy(graph)
        with pytest.raises(PostconditionError, match=message):
            run_passes(fresh, [broken(options)])


def test_every_pass_is_found_by_its_file() -> None:
    registered = passes.registry()
    files = {p.stem for p in Path(passes.__file__).parent.glob("[a-z]*.py")}
    assert {c.__module__.removeprefix("passes.") for c in registered.values()} == files
    assert all(name == c.name and c.summary for name, c in registered.items())
