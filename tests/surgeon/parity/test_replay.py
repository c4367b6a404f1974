"""The record of a patched checkpoint against what its passes make of its source."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import passes
from checkpoints import tiny_checkpoint
from command import run
from patching import apply
from surgeon.checkpoint import Checkpoint
from surgeon.parity.replay import compare_record


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    source = tiny_checkpoint(tmp_path / "source", "internvl", num_hidden_layers=2)
    apply(source, tmp_path / "patched", "pvm:layers=1,latent=32", "mixin:layers=0", "rope-dhr")
    return source, tmp_path / "patched"


def change_record(checkpoint: Path, change: Callable[[Any], None]) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    change(config["surgeon"])
    (checkpoint / "config.json").write_text(json.dumps(config))


def failures(source: Path, patched: Path) -> list[str] | None:
    with Checkpoint.open(source) as a, Checkpoint.open(patched) as b:
        return compare_record(a, b, passes.registry())


def every(key: str, value: Any) -> Callable[[Any], None]:
    return lambda record: [entry.update({key: value}) for entry in record["grafts"]]


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "visibility": (every("visibility", "all"), "surgeon.grafts.0.visibility is 'all'"),
    "rope_theta": (lambda r: r["grafts"][1].update(rope_theta=5e5), "surgeon.grafts.1.rope_theta is 500000.0"),
    "layers": (lambda r: r["grafts"][0].update(layers=[0]), "surgeon.grafts.0.layers is [0]"),
    "graft": (lambda r: r["grafts"].pop(), "surgeon.grafts.1 is None"),
    "order": (lambda r: r["positions"].update(tile_order="column"), "surgeon.positions.tile_order is 'column'"),
    "allocation": (lambda r: r.update(allocation="memory"), "surgeon.allocation is 'memory'"),
    "pass": (lambda r: r["passes"].append({"pvm": {"layers": [7]}}), "do not apply"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_the_passes_did_not_make_is_named(what: str, pair: tuple[Path, Path]) -> None:
    change, message = CHANGES[what]
    change_record(pair[1], change)
    reported = failures(*pair)
    assert reported and any(message in failure for failure in reported)


def test_what_the_passes_made_holds_after_each_of_two_patches(pair: tuple[Path, Path], tmp_path: Path) -> None:
    source, patched = pair
    assert failures(source, patched) == []
    apply(source, tmp_path / "first", "pvm:layers=1,latent=32", seed=3)
    apply(tmp_path / "first", tmp_path / "second", "mixin:layers=0")
    assert failures(source, tmp_path / "second") == failures(tmp_path / "first", tmp_path / "second") == []
    for a, b in ((source, source), (patched, patched), (patched, source), (patched, tmp_path / "second")):
        assert failures(a, b) is None  # neither was made of the other


def test_a_closed_graft_of_other_options_does_not_pass(pair: tuple[Path, Path]) -> None:
    """Its logits are the source's, whatever they are."""
    own = ("--prompt", "Hello!", "--steps", 1)
    result = run("validate", *pair, *own)
    assert result.exit_code == 0 and "record" in result.stdout, result.output
    change_record(pair[1], every("visibility", "all"))
    done = run("validate", *pair, *own)
    assert done.exit_code == 1
    assert (
        "surgeon.grafts.0.visibility is 'all'" in done.stdout and "its recorded passes make it 'causal'" in done.stdout
    )
