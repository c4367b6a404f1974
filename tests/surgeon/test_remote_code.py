"""A patched checkpoint in a Python where this tool cannot be imported."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgeon.remote_code
from checkpoints import FAMILIES, tiny_checkpoint, tiny_model
from patching import apply
from surgeon import models
from surgeon.errors import SurgeonError

LOAD = """
import sys, torch


class Hidden:
    # This tool is not installed here, whatever is in site-packages.

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("surgeon", "passes", "exporters", "commands", "cli"):
            raise ImportError(f"{name} is hidden")


sys.meta_path.insert(0, Hidden())
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers import AutoTokenizer, AutoImageProcessor
for path in sys.argv[1:]:
    model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True)
    (alpha,) = [name for name, _ in model.named_parameters() if name.endswith("layers.1.pvm.alpha")]
    with torch.no_grad():
        model.get_parameter(alpha).fill_(0.5)
        model.save_pretrained(f"{path}-again")
        other = AutoModelForImageTextToText.from_pretrained(f"{path}-again", trust_remote_code=True)
        assert float(other.get_parameter(alpha)) == 0.5
        ids = torch.tensor([[5, 6, 7]])
        assert torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits)
    for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        try:
            auto.from_pretrained(path)
            sys.exit("loaded without trust_remote_code: the grafts were dropped in silence")
        except ValueError as error:
            assert "trust_remote_code" in str(error), error
    AutoTokenizer.from_pretrained(path)
    AutoImageProcessor.from_pretrained(path)
    print("loaded", path)
"""


def test_every_family_loads_where_surgeon_is_not_installed(tmp_path: Path) -> None:
    for model_type in FAMILIES:
        source = tiny_checkpoint(tmp_path / f"{model_type}-source", model_type)
        apply(source, tmp_path / model_type, "pvm:layers=1,latent=32")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-P", "-c", LOAD, *FAMILIES]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.findall(r"loaded (\w+)$", done.stdout, re.MULTILINE) == list(FAMILIES)  # behind transformers' questions


@pytest.mark.parametrize("layout", ["published", "native"])
def test_both_key_layouts_load_into_the_patched_class(layout: str, tmp_path: Path) -> None:
    """Qwen2.5-VL's keys as its authors published them (visual.*, model.layers.*), which transformers also writes, and
    as its modules are named."""
    source = tmp_path / "source"
    original = tiny_model("qwen2_5_vl")
    original.save_pretrained(source)
    published = load_file(source / "model.safetensors")
    assert {"visual.patch_embed.proj.weight", "model.layers.0.mlp.up_proj.weight"} <= published.keys()
    if layout == "native":
        save_file(original.state_dict(), source / "model.safetensors", {"format": "pt"})
    apply(source, tmp_path / "patched", "pvm:layers=1,latent=32")
    patched = models.load(tmp_path / "patched")
    assert all(torch.equal(patched.get_parameter(name), p) for name, p in original.named_parameters())
    assert float(patched.model.language_model.layers[1].pvm.q_proj.weight.abs().sum()) > 0


def test_the_sources_own_classes_do_not_load_a_patched_checkpoint(tmp_path: Path) -> None:
    """A source with code of its own names its classes for the Auto classes: without the grafts, they are not these."""
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl")
    config = json.loads((source / "config.json").read_text())
    theirs = {"AutoConfig": "theirs.Config", "AutoModelForImageTextToText": "theirs.Model"}
    (source / "config.json").write_text(json.dumps({**config, "auto_map": theirs}))
    apply(source, tmp_path / "patched", "pvm:layers=1,latent=32")
    auto_map = json.loads((tmp_path / "patched" / "config.json").read_text())["auto_map"]
    assert {name: auto_map[name] for name in theirs} == {
        "AutoConfig": "modeling_surgeon.SurgeonConfig",
        "AutoModelForImageTextToText": "modeling_surgeon.SurgeonModel",
    }


@pytest.mark.parametrize("entries", [None, [], "modeling.Model"])
def test_an_auto_map_that_is_none_is_as_if_it_were_not_there(entries: Any, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "auto_map": entries}))
    apply(source, tmp_path / "patched", "pvm:layers=1,latent=32")
    written = json.loads((tmp_path / "patched" / "config.json").read_text())["auto_map"]
    assert set(written.values()) <= {f"modeling_surgeon.{name}" for name in ("SurgeonConfig", "SurgeonModel")} | {
        "modeling_surgeon.SurgeonQwen3VLModel"
    }


def test_a_package_does_not_travel() -> None:
    """transformers copies what `from .file import name` leads to, and nothing of `from . import file`."""
    with pytest.raises(SurgeonError, match=r"surgeon\.memory is a package"):
        surgeon.remote_code._travelling("surgeon.memory", {})
