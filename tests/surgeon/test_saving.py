"""`surgeon.save`: a model in memory as a checkpoint that everything takes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

import surgeon
from checkpoints import has_tokenizer, tiny_checkpoint
from surgeon.errors import OptionError, TargetError
from surgeon.inputs import Inputs

pytestmark = pytest.mark.skipif(not has_tokenizer(), reason="needs the demo checkpoint's tokenizer")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_checkpoint(tmp_path_factory.mktemp("saving") / "source", "qwen3_vl", num_hidden_layers=2)
    (path / "LICENSE").write_text("theirs")
    (path / "README.md").write_text("their card")
    (path / "modeling_theirs.py").write_text("raise SystemExit")
    return path


@pytest.fixture
def model(source: Path) -> Any:
    return surgeon.graft(source, surgeon.PVM(layers=[1], latent=32))


def test_what_is_saved_is_whole_and_the_same(source: Path, model: Any, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    surgeon.save(model, tmp_path / "saved", source)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"tokenizer.json", "preprocessor_config.json", "chat_template.jinja", "LICENSE"} <= names
    assert not {"README.md", "modeling_theirs.py", "surgeon-recipe.yaml"} & names
    Inputs.from_directory(tmp_path / "saved")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert all(torch.equal(again.get_parameter(name), value) for name, value in model.named_parameters())
    assert surgeon.validate(source, tmp_path / "saved", prompt="Hello!", steps=2).verdict == "passed"


def test_of_a_patched_checkpoint_it_says_what_passes_changed(tmp_path: Path) -> None:
    """The image processor as the passes set it, and no recipe: what training changed is in none."""
    from patching import apply

    apply(tiny_checkpoint(tmp_path / "source", "internvl"), tmp_path / "patched", "rope-dhr:max_tiles=3")
    surgeon.save(surgeon.load(tmp_path / "patched"), tmp_path / "saved", tmp_path / "patched")
    assert Inputs.from_directory(tmp_path / "saved").image_processor.max_patches == 3
    assert not (tmp_path / "saved" / "surgeon-recipe.yaml").exists()


def test_what_cannot_be_saved(source: Path, model: Any, tmp_path: Path) -> None:
    other = tiny_checkpoint(tmp_path / "other", "internvl")
    with pytest.raises(OptionError, match="of family qwen3_vl, and .* is of another"):
        surgeon.save(model, tmp_path / "saved", other)
    with pytest.raises(OptionError, match="cannot save a Linear as a checkpoint"):
        surgeon.save(torch.nn.Linear(2, 2), tmp_path / "saved", source)
    (tmp_path / "taken").mkdir()
    with pytest.raises(TargetError, match="exists"):
        surgeon.save(model, tmp_path / "taken", source)
    assert not (tmp_path / "saved").exists() and not list((tmp_path / "taken").iterdir())
