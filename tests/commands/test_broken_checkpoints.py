"""Checkpoints that cannot be read: each command refuses them in one line and leaves nothing behind."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command import assert_refused, entries, run

PVM = "pvm:layers=1,3,latent=32"


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def damage_not_a_checkpoint(path: Path) -> None:
    (path / "config.json").unlink()


def damage_family(path: Path) -> None:
    edit(path / "config.json", lambda config: config.update(model_type="llava"))


def damage_truncate(path: Path) -> None:
    shard = sorted(path.glob("*.safetensors"))[-1]
    os.truncate(shard, shard.stat().st_size - 5)


def damage_header(path: Path) -> None:
    shard = sorted(path.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:8] + b"x" + shard.read_bytes()[9:])


def damage_missing_shard(path: Path) -> None:
    sorted(path.glob("*.safetensors"))[0].unlink()


def _point_index_to(path: Path, file: str) -> None:
    def change(index: dict[str, Any]) -> None:
        index["weight_map"][next(iter(index["weight_map"]))] = file

    edit(path / "model.safetensors.index.json", change)


def damage_index_outside(path: Path) -> None:
    _point_index_to(path, "../other.safetensors")


def damage_index_absolute(path: Path) -> None:
    _point_index_to(path, "/other.safetensors")


def damage_disagree(path: Path) -> None:
    edit(path / "config.json", lambda config: config["text_config"].update(intermediate_size=256))


def damage_pickle(path: Path) -> None:
    for file in path.glob("model*"):
        file.unlink()
    (path / "pytorch_model.bin").write_bytes(b"PK")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (damage_not_a_checkpoint, ["is not a checkpoint", "config.json"]),
        (damage_family, ["'llava'", "supported: ", "qwen2_5_vl, qwen3_vl"]),
        (damage_truncate, ["truncated"]),
        (damage_header, ["corrupt"]),
        (damage_missing_shard, ["is missing", "model.safetensors.index.json"]),
        (damage_index_outside, ["outside the directory"]),
        (damage_index_absolute, ["outside the directory"]),
        (damage_disagree, ["128", "the config asks for", "256"]),
        (damage_pickle, ["pickle"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_checkpoint_that_cannot_be_read(
    copy: Path, tmp_path: Path, damage: Callable[[Path], None], expected: list[str]
) -> None:
    damage(copy)
    before = entries(copy)
    assert_refused(run("patch", copy, tmp_path / "out", "--pass", PVM), *expected)
    assert_refused(run("export", copy, tmp_path / "bundle", "--dtype", "fp32"), *expected)
    if damage is not damage_pickle:  # a config is enough to inspect
        assert_refused(run("inspect", copy), *expected)
    assert [path.name for path in tmp_path.iterdir()] == ["source"] and entries(copy) == before
