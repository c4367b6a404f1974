"""A patched checkpoint that is patched again: what each patch adds, and what it says of itself."""

import json
from pathlib import Path

import pytest

import passes
from checkpoints import QWEN_TYPES, tiny_checkpoint
from patching import apply
from surgeon.checkpoint.reader import Checkpoint
from surgeon.patch import patch
from surgeon.recipe import FILE_NAME, Recipe

MIXIN = {"mixin": {"layers": [1, 3], "num_heads": 4, "head_dim": 16, "intermediate": 128, "eps": 1e-6, "tiles": "both"}}


@pytest.mark.parametrize("model_type", QWEN_TYPES)
def test_the_recipe_of_each_patch_replays_on_its_own_source(model_type: str, tmp_path: Path) -> None:
    once, twice, again = (tmp_path / name for name in ("once", "twice", "again"))
    apply(tiny_checkpoint(tmp_path / "source", model_type), once, "pvm:layers=1,latent=32", seed=2)
    apply(once, twice, "mixin:every=2", seed=3)
    recipe = Recipe.read(twice / FILE_NAME)
    assert recipe.seed == 3 and [list(entry) for entry in recipe.passes] == [["mixin"]]
    (options,) = (entry["mixin"] for entry in recipe.passes)
    assert options is not None and MIXIN["mixin"].items() <= options.items()
    record = json.loads((twice / "config.json").read_text())["surgeon"]
    assert [list(entry) for entry in record["passes"]] == [["pvm"], ["mixin"]]
    patch(once, again, recipe.make_passes(passes.registry()), seed=recipe.seed)
    files = sorted(path.name for path in twice.iterdir())
    assert files == sorted(path.name for path in again.iterdir())
    assert all((twice / name).read_bytes() == (again / name).read_bytes() for name in files)


def test_the_index_tells_the_bytes_of_all_tensors(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl", sharded=True)
    apply(source, tmp_path / "out", "pvm:layers=1,3,latent=32")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        assert index["metadata"]["total_size"] == sum(info.nbytes for info in checkpoint.tensors.values())
        assert index["weight_map"].keys() == checkpoint.tensors.keys()
