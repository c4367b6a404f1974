"""`surgeon engine --kernels`: what it says it replaced, and what it cannot do."""

import json
import sys
from collections.abc import Callable

import pytest
import torch
from click.testing import CliRunner, Result

from cli import cli
from pairs import PLAIN, Pair

RECIPE = ("pvm:layers=1,2,latent=64",)


def plan(pair: Pair, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["engine", str(pair.bundle), "--target", "native", "--dry-run", *arguments])


@pytest.fixture
def grafted(export: Callable[..., Pair]) -> Pair:
    return export("qwen3_vl", RECIPE, torch.float16, head_dim=32)


def test_what_fused_kernels_compute_is_printed(grafted: Pair) -> None:
    told = plan(grafted, "--kernels", "fused")
    assert (told.exit_code, told.stderr) == (0, "")
    assert "decoder: 2 of PersistentVisualMemory are computed by fused kernels" in told.stdout.splitlines()
    engines = json.loads(plan(grafted, "--kernels", "fused", "--json").stdout)["engines"]
    assert {name: each["fused"] for name, each in engines.items() if each["fused"]} == {
        "decoder": {"PersistentVisualMemory": 2}
    }
    assert "fused kernels" not in plan(grafted).stdout


def test_a_bundle_without_grafts_has_nothing_to_fuse(export: Callable[..., Pair]) -> None:
    pair = export("qwen3_vl", PLAIN, torch.float16, head_dim=32)
    told = plan(pair, "--kernels", "fused")
    assert told.exit_code == 0 and "fused kernels" not in told.stdout
    assert told.stderr == "warning: --kernels fused: the bundle has no grafts, which alone have fused kernels\n"


def test_without_triton_standard_operators_are_offered(grafted: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    told = plan(grafted, "--kernels", "fused")
    assert told.exit_code == 2 and told.stdout == ""
    (line,) = told.stderr.splitlines()
    assert line.startswith("error: --kernels fused needs Triton") and line.endswith("or take --kernels standard")
    assert plan(grafted).exit_code == 0
