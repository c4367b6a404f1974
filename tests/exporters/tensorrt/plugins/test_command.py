"""`surgeon engine --kernels`: what it says it replaced, and what it cannot do."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result

from command import run
from exporters.kernels import tuned
from exporters.kernels.folder import VARIABLE
from exporters.kernels.plan import plan as launches
from exporters.kernels.workload import Size, attention_workload
from exporters.tensorrt import build
from exporters.tensorrt.build import Options, plan_engines
from exporters.tensorrt.library import Gpu
from pairs import PLAIN, Pair
from surgeon.checkpoint.reader import Checkpoint
from surgeon.memory.graft import Graft
from surgeon.models import build_meta, read_config

RECIPE = ("pvm:layers=1,2,latent=64",)


def plan(pair: Pair, *arguments: str) -> Result:
    return run("engine", pair.bundle, "--target", "native", "--dry-run", *arguments)


@pytest.fixture
def grafted(export: Callable[..., Pair]) -> Pair:
    return export("qwen3_vl", RECIPE, torch.float16, head_dim=32)


def test_what_fused_kernels_compute_is_printed(grafted: Pair) -> None:
    result = plan(grafted, "--kernels", "fused")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "decoder: 2 of PersistentVisualMemory are computed by fused kernels" in result.stdout.splitlines()
    engines = json.loads(plan(grafted, "--kernels", "fused", "--json").stdout)["engines"]
    assert {name: each["fused"] for name, each in engines.items() if each["fused"]} == {
        "decoder": {"PersistentVisualMemory": 2}
    }
    assert "fused kernels" not in plan(grafted).stdout


GPU = "NVIDIA Test 9000"


@pytest.fixture
def tile_configs(grafted: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As autotune keeps them, of a decoding step over the memory that a decode profile is for."""
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    tuned.read.cache_clear()
    with Checkpoint.open(grafted.checkpoint) as checkpoint:
        model = build_meta(read_config(checkpoint.config))
    graft = next(module for module in model.modules() if isinstance(module, Graft))
    decode = plan_engines(grafted.bundle, Options(target="sm80", graphs=("decoder",))).graphs[0].profiles[0]
    chain, types = attention_workload(graft, Size(slots=decode.sizes["M"].opt, dtype="float16"))
    measured = {}
    for launch in launches(chain, types):
        best = dataclasses.replace(launch.tile_config, num_warps=2)
        measured[tuned.key(launch.step, launch.inputs)] = tuned.Measured(best, 1e-6, 2e-6, 3)
    return tuned.keep(GPU, "3.6.0", measured)


def test_launches_are_cut_as_they_were_measured(grafted: Pair, tile_configs: Path) -> None:
    result = plan(grafted, "--kernels", "fused", "--tile-configs", str(tile_configs))
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"6 kinds of launches are cut as measured on {GPU}" in result.stdout.splitlines()
    assert "tile configs are the heuristic's" in plan(grafted, "--kernels", "fused").stdout
    graph = plan_engines(
        grafted.bundle, Options(graphs=("decoder",), kernels="fused", tile_configs=tile_configs)
    ).graphs[0]
    warps = {
        name: [variant.launch.tile_config.num_warps for variant in node.variants]
        for name, node in graph.plugins.items()
    }
    assert {variants[0] for variants in warps.values()} == {2} and all(
        2 not in variants[1:] for variants in warps.values()
    )


def test_the_file_of_the_gpu_that_is_here_is_taken_by_itself(
    grafted: Pair, tile_configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "gpu", lambda: Gpu(GPU, "sm89"))
    assert f"cut as measured on {GPU}" in plan(grafted, "--kernels", "fused").stdout
    assert "tile configs are the heuristic's" in plan(grafted, "--kernels", "fused", "--target", "sm89").stdout


def test_tile_configs_that_cannot_be_taken_are_refused(grafted: Pair, tile_configs: Path, tmp_path: Path) -> None:
    standard = plan(grafted, "--tile-configs", str(tile_configs))
    assert (
        standard.exit_code == 2
        and "--tile-configs applies to fused kernels only: add --kernels fused" in standard.stderr
    )
    for content, why in ((None, "No such file"), ("[]", "it is no file of measured tile configs")):
        other = tmp_path / "other.json"
        if content is not None:
            other.write_text(content)
        result = plan(grafted, "--kernels", "fused", "--tile-configs", str(other))
        assert result.exit_code == 2 and why in result.stderr and "measure on the GPU with" in result.stderr
    other.write_text(json.dumps({"format": 1, "gpu": GPU, "launches": {}}))
    result = plan(grafted, "--kernels", "fused", "--tile-configs", str(other))
    assert result.exit_code == 0 and f"none of what was measured on {GPU} is of this bundle's sizes" in result.stderr


def test_a_bundle_without_grafts_has_nothing_to_fuse(export: Callable[..., Pair]) -> None:
    pair = export("qwen3_vl", PLAIN, torch.float16, head_dim=32)
    result = plan(pair, "--kernels", "fused")
    assert result.exit_code == 0 and "fused kernels" not in result.stdout
    assert result.stderr == "warning: --kernels fused: the bundle has no grafts, which alone have fused kernels\n"


def test_without_triton_standard_operators_are_offered(grafted: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    result = plan(grafted, "--kernels", "fused")
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: --kernels fused needs Triton") and line.endswith("or take --kernels standard")
    assert plan(grafted).exit_code == 0
