"""`surgeon patch`: by arguments, by recipe, planned only; what cannot be is one line and leaves nothing behind."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from command import ROOT, assert_refused, entries, run

PVM = "pvm:layers=1,3,latent=32"
QWEN3_VL_8B = {
    "model_type": "qwen3_vl",
    "text_config": {
        "model_type": "qwen3_vl_text",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "vision_config": {"out_hidden_size": 4096, "deepstack_visual_indexes": [8, 16, 24]},
}
QWEN3_VL_4B = json.loads(json.dumps(QWEN3_VL_8B).replace("4096", "2560").replace("12288", "9728"))


def test_patch_by_arguments_and_by_the_recipe_it_wrote(source: Path, tmp_path: Path) -> None:
    first = run("patch", source, tmp_path / "a", "--pass", PVM, "--seed", 7)
    assert (first.exit_code, first.stderr) == (0, "")
    assert "model.language_model.layers.3.pvm" in first.stdout
    second = run("patch", source, tmp_path / "b", "-r", tmp_path / "a" / "surgeon-recipe.yaml", "--json")
    report = json.loads(second.stdout)
    assert report["seed"] == 7 and report["new_parameters"] == sum(report["grafts"].values()) > 0
    a, b = (load_file(tmp_path / name / "model-pvm.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    other = run("patch", source, tmp_path / "c", "--pass", PVM, "--seed", 8)
    c = load_file(tmp_path / "c" / "model-pvm.safetensors")
    assert other.exit_code == 0 and not all(torch.equal(a[name], c[name]) for name in a)


@pytest.mark.parametrize("how", ["copy", "link"])
def test_weights_are_copied_or_linked_as_asked(source: Path, tmp_path: Path, how: str) -> None:
    done = run("patch", source, tmp_path / "out", "--pass", PVM, "--weights", how)
    assert done.exit_code == 0, done.stderr
    files, own = (list(folder.glob("*.safetensors")) for folder in (tmp_path / "out", source))
    shared = {file.stat().st_ino for file in files} & {file.stat().st_ino for file in own}
    assert len(shared) == (len(own) if how == "link" else 0)


def test_the_seed_that_was_asked_for_is_taken_whatever_the_recipe_says(source: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("seed: 7\npasses:\n- pvm: {layers: [1], latent: 32}\n")
    for asked, expected in ((None, 7), (0, 0), (8, 8)):
        out = tmp_path / str(asked)
        arguments = () if asked is None else ("--seed", asked)
        done = run("patch", source, out, "-r", tmp_path / "recipe.yaml", "--json", *arguments)
        assert json.loads(done.stdout)["seed"] == expected
        assert yaml.safe_load((out / "surgeon-recipe.yaml").read_text())["seed"] == expected


@pytest.mark.parametrize(
    ("size", "config", "total"), [("8b", QWEN3_VL_8B, "27,922,179"), ("4b", QWEN3_VL_4B, "22,728,963")]
)
def test_dry_run_of_the_published_recipes_counts_the_published_parameters(
    tmp_path: Path, size: str, config: dict[str, Any], total: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    recipe = ROOT / "examples" / "recipes" / f"qwen3-vl-{size}-pvm.yaml"
    result = run("patch", tmp_path, "--recipe", recipe, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert f"total {total} new parameters" in result.stdout
    assert total in recipe.read_text()
    assert [name for name, _ in entries(tmp_path)] == ["config.json"]


def test_dry_run_writes_nothing_and_refuses_a_target_that_exists(source: Path, tmp_path: Path) -> None:
    planned = run("patch", source, tmp_path / "out", "--pass", PVM, "--dry-run", "--json")
    assert json.loads(planned.stdout)["bytes_written"] == 0 and not (tmp_path / "out").exists()
    assert_refused(run("patch", source, tmp_path, "--pass", PVM, "--dry-run"), "exists")


def test_overwrite_replaces_a_target(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    assert_refused(run("patch", source, tmp_path / "out", "--pass", PVM), "exists", "--overwrite")
    assert run("patch", source, tmp_path / "out", "--pass", PVM, "--overwrite").exit_code == 0
    assert not (tmp_path / "out" / "old").exists() and (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("pvm:layers=4", ["layer 4 is out of range", "0 to 3"]),
        ("pvm:layers=-1", ["layer -1 is out of range"]),
        ("pvm:layers=1,1", ["layer 1 is named twice"]),
        ("pvm:layers=every:9", ["4 layers"]),
        ("pvm:layers=1,latent=40", ["40", "head_dim 16", "32 or 48"]),
        ("pvm:layers=1,latnet=32", ["unknown option 'latnet'", "'latent'"]),
        ("pvm:latent=32", ["'layers' is required"]),
        ("pvmm:layers=1", ["unknown pass 'pvmm'", "'pvm'"]),
        ("pvm:layers=some", ["'layers'", "every:N"]),
        ("pvm:1", ["option=value"]),
    ],
)
def test_a_pass_that_cannot_be(source: Path, tmp_path: Path, argument: str, expected: list[str]) -> None:
    before = entries(source)
    assert_refused(run("patch", source, tmp_path / "out", "--pass", argument), *expected)
    assert entries(tmp_path) == [] and entries(source) == before


def test_a_pass_that_is_already_applied(source: Path, tmp_path: Path) -> None:
    assert run("patch", source, tmp_path / "once", "--pass", PVM).exit_code == 0
    assert_refused(run("patch", tmp_path / "once", tmp_path / "twice", "--pass", PVM), "already applied")
    twice = run("patch", source, tmp_path / "twice", "--pass", PVM, "--pass", PVM)
    assert_refused(twice, "already applied")
    assert [path.name for path in tmp_path.iterdir()] == ["once"]


def test_a_recipe_that_is_not_one(source: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("passes: [pvm\n")
    assert_refused(run("patch", source, tmp_path / "out", "-r", tmp_path / "recipe.yaml"), "not readable YAML")
    assert_refused(run("patch", source, tmp_path / "out", "-r", tmp_path / "none.yaml"), "does not exist")
    assert not (tmp_path / "out").exists()
