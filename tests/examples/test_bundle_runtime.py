"""examples/bundle_runtime.py answers as the checkpoint does, in a process that can import nothing of what made it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from checkpoints import DEMO, has_tokenizer, tiny_checkpoint
from command import ROOT
from exporters.export import export_bundle
from pairs import open_gates, record_visibility
from patching import apply
from surgeon import models
from surgeon.inputs import Inputs, Prompt
from surgeon.torch_generate import TorchGenerator

pytestmark = pytest.mark.skipif(not has_tokenizer(), reason="the demo checkpoint is not there")

Folders = Callable[[str], Path]
"""Name of a case -> a folder with a checkpoint and its bundle."""

IMAGES = DEMO.parent / "images"
TWO_SHAPES, THREE_SHAPES = IMAGES / "red-triangle-green-circle.png", IMAGES / "orange-square-green-star-red-circle.png"
RECIPES = {
    "plain": (),
    "pvm": ("pvm:layers=2,4,6,latent=64",),
    "mixin": ("mixin:layers=1,5,num_heads=3,intermediate=48,rope_theta=5000",),
}
PROMPTS = [
    Prompt("Where is the circle?", (TWO_SHAPES,)),
    Prompt("Describe each picture.", (THREE_SHAPES, TWO_SHAPES)),
    Prompt("Hello"),
]
ALONE = """
import runpy, sys
absent = "surgeon", "exporters", "passes", "commands", "cli", "torch", "transformers"
sys.modules.update(dict.fromkeys(absent))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(bundle: Path, prompt: Prompt, *options: object) -> subprocess.CompletedProcess[str]:
    """The example as a process without this project, torch and transformers."""
    images = [part for image in prompt.images for part in ("--image", image)]
    arguments = [ROOT / "examples" / "bundle_runtime.py", bundle, *images, "--prompt", prompt.text, *options]
    command = [sys.executable, "-I", "-c", ALONE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def answered(bundle: Path, prompt: Prompt, max_new_tokens: int) -> dict[str, Any]:
    result = run(bundle, prompt, "--max-new-tokens", max_new_tokens, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def expected(checkpoint: Path, prompt: Prompt, max_new_tokens: int) -> dict[str, Any]:
    """What transformers' own generate answers."""
    model = models.load(checkpoint, dtype=torch.float32)
    (answer,) = TorchGenerator(model, Inputs.from_directory(checkpoint)).generate([prompt], max_new_tokens)
    return {"text": answer.text, "token_ids": answer.token_ids}


def widen_gates(checkpoint: Path) -> None:
    """So far that a graft changes which tokens are the likeliest."""
    for path in checkpoint.glob("*.safetensors"):
        tensors = load_file(path)
        gates = [name for name in tensors if name.endswith((".alpha", "gate"))]
        if gates:
            path.unlink()  # never write into a file that may share its bytes
            save_file(tensors | {name: tensors[name] * 6 for name in gates}, path, {"format": "pt"})


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    @cache
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp("demo")
        checkpoint = folder / "checkpoint"
        if RECIPES[name]:
            apply(DEMO, checkpoint, *RECIPES[name])
            open_gates(checkpoint)
            widen_gates(checkpoint)
        else:
            shutil.copytree(DEMO, checkpoint)
        export_bundle(checkpoint, folder / "bundle", dtype=torch.float32, max_length=256)
        return folder

    return make


@pytest.mark.parametrize("prompt", PROMPTS, ids=["one image", "two images", "no image"])
@pytest.mark.parametrize("name", RECIPES)
def test_the_tokens_are_the_checkpoints(demo: Folders, name: str, prompt: Prompt) -> None:
    folder = demo(name)
    answer = answered(folder / "bundle", prompt, 24)
    assert answer == expected(folder / "checkpoint", prompt, 24)
    if RECIPES[name] and prompt.images:
        assert answer != answered(demo("plain") / "bundle", prompt, 24)


def test_an_answer_ends_where_the_bundle_does(demo: Folders) -> None:
    folder = demo("plain")
    prompt = Prompt("Describe the picture in detail. " * 33, (TWO_SHAPES,))
    length = int(Inputs.from_directory(folder / "checkpoint").prepare([prompt]).lengths[0])
    assert 240 < length < 256
    answer = answered(folder / "bundle", prompt, 300)["token_ids"]
    assert len(answer) == 256 - length and 615 not in answer
    result = run(folder / "bundle", Prompt(prompt.text * 2))
    assert result.returncode == 2 and "the bundle was exported for 256" in result.stderr


def test_windows_of_qwen2_5_vl_and_a_memory_that_all_tokens_see(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "source", "qwen2_5_vl", num_hidden_layers=3)
    path = tmp_path / "source" / "preprocessor_config.json"
    # several windows, some of them cut off; limits in the keys of older files, and everything else by default
    settings = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 40000}
    path.write_text(json.dumps(settings))
    apply(tmp_path / "source", tmp_path / "checkpoint", "mixin:layers=0,2,num_heads=3,intermediate=48")
    open_gates(tmp_path / "checkpoint")
    record_visibility(tmp_path / "checkpoint", "all")
    export_bundle(tmp_path / "checkpoint", tmp_path / "bundle", dtype=torch.float32, max_length=256)
    pixels = np.random.default_rng(0).integers(0, 256, (180, 300, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    prompt = Prompt("What is it?", (tmp_path / "noise.png", TWO_SHAPES))
    assert answered(tmp_path / "bundle", prompt, 24) == expected(tmp_path / "checkpoint", prompt, 24)


def test_what_it_does_not_run_is_refused(demo: Folders, tmp_path: Path) -> None:
    folder = demo("plain")
    for prompt, reason in (
        (Prompt("a <|image_pad|> b"), "<|image_pad|> in its text"),
        (Prompt("a", (tmp_path / "none.png",)), "none.png"),
    ):
        result = run(folder / "bundle", prompt)
        assert result.returncode == 2 and result.stderr.startswith("error: ") and reason in result.stderr
    shutil.copytree(folder / "bundle", tmp_path / "bundle", symlinks=True)
    manifest = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    for changed, reason in (
        ({"dtype": "bfloat16"}, "in bfloat16"),
        ({"source": manifest["source"] | {"model_type": "internvl"}}, "is of internvl"),
    ):
        (tmp_path / "bundle" / "bundle.json").write_text(json.dumps(manifest | changed))
        result = run(tmp_path / "bundle", Prompt("a"))
        assert result.returncode == 2 and result.stdout == "" and reason in result.stderr
