"""Checkpoints in a layout that has to be imported: every command says so, and how."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from command import assert_refused, entries, run
from golden import DATA
from published import golden_checkpoint
from surgeon import load
from surgeon.errors import CheckpointError
from surgeon.importers import supported


def pvm(directory: Path) -> Path:
    """By its tensors."""
    return Path(shutil.copytree(DATA / "pvm_model_a", directory))


def pvm_config(directory: Path) -> Path:
    """By its config; the weights are those of a plain Qwen3-VL."""
    pvm(directory)
    config = json.loads((directory / "config.json").read_text())
    config["text_config"] |= {"pvm_layers": [1, 3], "pvm_hidden_size": 32}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


LAYOUTS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "InternVL": ("internvl_chat", golden_checkpoint),
    "CoMemo": ("comemo_chat", lambda directory: golden_checkpoint(directory, "comemo")),
    "PVM": ("pvm_qwen3_vl", pvm),
    "PVM by its config": ("pvm_qwen3_vl", pvm_config),
}


def test_every_importer_is_tried() -> None:
    assert {name for name, _ in LAYOUTS.values()} == set(supported())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_command_names_surgeon_import(tmp_path: Path, layout: str) -> None:
    name, make = LAYOUTS[layout]
    source = make(tmp_path / "source")
    before, out = entries(source), tmp_path / "out"
    for arguments in (
        ("inspect", source),
        ("patch", source, out, "--pass", "pvm:layers=2,latent=32"),
        ("patch", source, "--dry-run", "--pass", "pvm:layers=2,latent=32"),
        ("export", source, out, "--dtype", "fp32"),
        ("generate", source, "--prompt", "What is this?"),
        ("validate", source, source),
    ):
        assert_refused(run(*arguments), f"in the {name} layout", f"surgeon import {source} OUT")
    with pytest.raises(CheckpointError, match="surgeon import"):
        load(source)
    assert [path.name for path in tmp_path.iterdir()] == ["source"] and entries(source) == before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_config_alone_is_enough(tmp_path: Path, layout: str) -> None:
    name, make = LAYOUTS[layout]
    source = make(tmp_path / "source")
    (source / "model.safetensors").unlink()
    if layout == "PVM":  # nothing says so any more
        assert run("inspect", source).exit_code == 0
    else:
        assert_refused(run("inspect", source), f"in the {name} layout", "surgeon import")
