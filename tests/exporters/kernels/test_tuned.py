"""Tile configs as measured: kept in a file per GPU, chosen where they are known."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from exporters.kernels import tuned
from exporters.kernels.kernel import Step, TileConfig
from exporters.kernels.launch import _planned
from exporters.kernels.plan import TensorType, heuristic, plan
from exporters.kernels.workload import Size, attention_workload
from surgeon.memory.graft import Graft
from surgeon.memory.pvm import PersistentVisualMemory

GPU = "NVIDIA Test 9000"


def pvm_graft(width: int = 96) -> PersistentVisualMemory:
    return PersistentVisualMemory(width, 64, 80, head_dim=32, num_key_value_heads=1, eps=1e-6)


def measured(tile_config: TileConfig) -> tuned.Measured:
    return tuned.Measured(tile_config, 1e-6, 2e-6, 3)


def test_what_is_kept_is_chosen_and_the_rule_for_the_rest(folder: Path) -> None:
    chain, types = attention_workload(pvm_graft(), Size(slots=50, dtype="float32"))
    first = plan(chain, types)[0]
    other = dataclasses.replace(first.tile_config, outputs=2 * first.tile_config.outputs)
    name = tuned.key(first.step, first.inputs)
    assert tuned.keep(GPU, "3.6.0", {name: measured(other)}) == folder / "nvidia-test-9000.json"

    launches = plan(chain, types, tuned.chooser(tuned.read(GPU)))
    assert launches[0].tile_config == other
    assert [each.tile_config for each in launches[1:]] == [each.tile_config for each in plan(chain, types)[1:]]


def test_measurements_are_added_to_those_of_before(folder: Path) -> None:
    tuned.keep(GPU, "3.6.0", {"a": measured(TileConfig(outputs=16)), "b": measured(TileConfig())})
    tuned.keep(GPU, "3.6.0", {"a": measured(TileConfig(outputs=32))})
    assert tuned.read(GPU) == {"a": TileConfig(outputs=32), "b": TileConfig()}
    assert [path.name for path in folder.iterdir()] == ["nvidia-test-9000.json"]


def test_a_key_joins_near_requests_and_parts_weights() -> None:
    def keys(slots: int, batch: int = 1, graft: Graft | None = None) -> list[str]:
        size = Size(batch=batch, slots=slots)
        return [tuned.key(each.step, each.inputs) for each in plan(*attention_workload(graft or pvm_graft(), size))]

    assert keys(900) == keys(1024)
    assert keys(1024)[1] != keys(1025)[1]
    assert keys(1024, batch=2)[0] != keys(1024)[0]
    wider = pvm_graft(128)
    assert keys(1024, graft=wider)[0] != keys(1024)[0]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        json.dumps({"format": 1, "gpu": "NVIDIA Other", "launches": {}}),
        json.dumps({"format": 2, "gpu": GPU, "launches": {}}),
        json.dumps({"format": 1, "gpu": GPU, "launches": {"a": {"tile_config": {"tokens": 3}}}}),
        json.dumps({"format": 1, "gpu": GPU, "launches": {"a": {"tile_config": {"tokens": 8}}}}),
        json.dumps({"format": 1, "gpu": GPU, "launches": {"a": {"tile_config": {"inner": "64"}}}}),
        json.dumps({"format": 1, "gpu": GPU, "launches": {"a": {"tile_config": {"block_size": 64}}}}),
        json.dumps({"format": 1, "gpu": GPU, "launches": []}),
        json.dumps({"format": 1, "gpu": GPU, "launches": {"a": {"tile_config": {"num_warps": 1 << 40}}}}),
        json.dumps({"format": 1, "gpu": GPU, "launches": {"a": {"tile_config": {"inner": 1 << 40}}}}),
        "[" * 100_000,
    ],
)
def test_a_damaged_or_foreign_file_is_said_once_and_ignored(folder: Path, content: str) -> None:
    (folder / "nvidia-test-9000.json").write_text(content)
    with pytest.warns(UserWarning, match=r"nvidia-test-9000.json is ignored: .*measure again, or delete it") as warned:
        assert tuned.read(GPU) == {}
        assert tuned.read(GPU) == {}
    assert len(warned) == 1


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": 1}', '{"format": 1, "gpu": "a", "launches": {"a": 1}}'])
def test_a_file_that_was_named_must_be_one(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tile_configs.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="it is no file of measured tile configs"):
        tuned.load(path)


def test_what_was_taken_is_told() -> None:
    chain, types = attention_workload(pvm_graft(), Size(slots=50, dtype="float32"))
    names = [tuned.key(each.step, each.inputs) for each in plan(chain, types)]
    kept = {name: TileConfig() for name in (names[0], "another")}
    used: set[str] = set()
    plan(chain, types, tuned.chooser(kept, used))
    assert used == {names[0]}


def test_without_a_gpu_tile_configs_are_heuristic() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    chain, types = attention_workload(pvm_graft(), Size(slots=20))
    assert plan(chain, types, tuned.choose) == plan(chain, types, heuristic)


def test_of_several_gpus_the_current_one_says_which_tile_config(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain, types = attention_workload(pvm_graft(), Size(slots=50, dtype="float32"))
    first = plan(chain, types)[0]
    tile_config = {
        "NVIDIA Other": dataclasses.replace(first.tile_config, num_warps=2),
        GPU: dataclasses.replace(first.tile_config, num_warps=8),
    }
    for gpu, best in tile_config.items():
        tuned.keep(gpu, "3.6.0", {tuned.key(first.step, first.inputs): measured(best)})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tuned, "_gpu_name", lambda index: list(tile_config)[index])
    for index, best in enumerate(tile_config.values()):
        monkeypatch.setattr(torch.cuda, "current_device", lambda index=index: index)
        assert tuned.choose(first.step, first.inputs) == best


def test_a_file_of_an_earlier_version_is_read_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"format": 1, "gpu": GPU, "launches": {"a": {"blocks": {"outputs": 32}}}}))
    with pytest.warns(UserWarning, match="of an earlier version"):
        assert tuned.load(path).tile_configs == {"a": TileConfig(outputs=32)}
    # whose keys have an input's former name
    chain, types = attention_workload(pvm_graft(), Size(slots=20))
    keys = [tuned.key(launch.step, launch.inputs) for launch in plan(chain, types)]
    names = [key.replace("residual=", "onto=") if key.startswith("pvm_inject") else key for key in keys]
    former = {name: {"blocks": {"outputs": 32}} for name in names}
    assert len(former.keys() - set(keys)) == 1
    path.write_text(json.dumps({"format": 1, "gpu": GPU, "launches": former}))
    with pytest.warns(UserWarning, match="of an earlier version"):
        assert tuned.load(path).tile_configs.keys() == set(keys)


def test_plans_are_made_anew_for_what_was_measured(folder: Path) -> None:
    """Those of a model that has answered in this process already."""
    chain, types = attention_workload(pvm_graft(), Size(slots=50, dtype="float32"))
    first = plan(chain, types)[0]
    other = dataclasses.replace(first.tile_config, outputs=2 * first.tile_config.outputs)
    key = tuple((name, tensor.shape, getattr(torch, tensor.dtype)) for name, tensor in types.items())

    def choose(step: Step, inputs: Mapping[str, TensorType]) -> TileConfig:
        return tuned.chooser(tuned.read(GPU))(step, inputs)

    def planned() -> TileConfig:
        return _planned(chain, key, choose, torch.device("cpu"))[0].tile_config

    assert planned() == first.tile_config
    tuned.keep(GPU, "3.6.0", {tuned.key(first.step, first.inputs): measured(other)})
    assert planned() == other
