"""`surgeon autotune` prints what was measured, and says what it needs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from command import assert_refused, run
from exporters.kernels import autotune
from exporters.kernels.autotune import TunedCheckpoint, TunedGraft
from exporters.kernels.kernel import TileConfig
from exporters.kernels.tuned import Measured


def test_without_a_gpu_it_says_that_it_needs_one(source: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert_refused(run("autotune", source), "finds no CUDA device: tile configs are measured on the GPU they are for")


def test_it_prints_what_was_measured(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    launches = {"pvm_text x=bfloat16[1,1,4096]": Measured(TileConfig(outputs=32), 2e-6, 3.5e-6, 7)}
    kept = TunedCheckpoint(
        "NVIDIA Test 9000", tmp_path / "tile_configs.json", [TunedGraft("pvm", "batch 1 x 1", launches)]
    )

    def tune_checkpoint(checkpoint: str, **options: Any) -> TunedCheckpoint:
        asked.update(options, checkpoint=checkpoint)
        return kept

    monkeypatch.setattr(autotune, "tune_checkpoint", tune_checkpoint)
    printed = run("autotune", source, "--batch", 1, "--batch", 8, "--dtype", "bf16").stdout
    for expected in ("pvm_text", "3.50 us", "2.00 us", "batch 1 x 1", f"kept for NVIDIA Test 9000 in {kept.file}"):
        assert expected in printed
    assert (asked["batches"], asked["lengths"], asked["slots"]) == ((1, 8), (1,), (1024,))
    assert (asked["checkpoint"], asked["dtype"]) == (str(source), "bfloat16")
    described = json.loads(run("autotune", source, "--json").stdout)
    assert described["grafts"][0]["launches"]["pvm_text x=bfloat16[1,1,4096]"]["tile_config"]["outputs"] == 32
