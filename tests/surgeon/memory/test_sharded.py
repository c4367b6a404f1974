"""Training over several processes: sharded and replicated models compute what one process does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy

from checkpoints import FAMILIES, tiny_checkpoint, tiny_model
from command import ROOT
from patching import apply
from surgeon import models


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    directory = tmp_path_factory.mktemp("shared")
    tiny_model("qwen3_vl").save_pretrained(directory / "a")
    apply(directory / "a", directory / "b", "pvm:layers=1,3,latent=32", "mixin:layers=2")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "two_processes.py"), str(directory / "b"), str(directory / "store")]
    processes = [
        subprocess.Popen(
            [*command, str(rank)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs[0][1] + outputs[1][1]
    losses_by_way: dict[str, list[float]] = json.loads(outputs[0][0].splitlines()[-1])
    return losses_by_way


@pytest.mark.parametrize("way", ["ddp", "layers", "layers_and_grafts", "checkpointed"])
def test_losses_are_those_of_one_process(losses: dict[str, list[float]], way: str) -> None:
    """fp32: the mean over processes is taken in another order."""
    assert losses[way] == pytest.approx(losses["alone"], rel=1e-6)
    assert losses["alone"][-1] != losses["alone"][0]


def test_mixed_precision_reaches_the_memory(losses: dict[str, list[float]]) -> None:
    """bf16 weights beside visual embeddings that were fp32: three decimal digits are left."""
    assert losses["mixed_precision"] == pytest.approx(losses["alone"], rel=2e-2)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_decoder_layers_are_found_by_the_name_of_their_class(model_type: str, tmp_path: Path) -> None:
    """As `fsdp_transformer_layer_cls_to_wrap` names it, and as transformers does for FSDP and device maps."""
    source = tiny_checkpoint(tmp_path / "a", model_type)
    apply(source, tmp_path / "b", "mixin:every=2")
    plain, patched = models.load(source), models.load(tmp_path / "b")
    assert patched._no_split_modules == plain._no_split_modules
    decoder = plain.get_submodule(models.family(model_type).text_model)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[type(decoder.layers[0]).__name__],
    )
    wrapped = []
    for model in (plain, patched):
        policy = fsdp2_prepare_auto_wrap_policy(plugin, model)
        wrapped.append([name for name, module in model.named_modules() if policy(module)])
    assert wrapped[0] == wrapped[1] and len(wrapped[0]) == len(decoder.layers)
