"""`surgeon export` writes a bundle that is inspected and answers as its checkpoint does."""

import json
from pathlib import Path

import pytest
from PIL import Image

from checkpoints import has_tokenizer
from command import assert_refused, run

PVM = "pvm:layers=1,3,latent=32"


@pytest.mark.skipif(not has_tokenizer(), reason="needs the demo checkpoint's tokenizer")
def test_a_bundle_is_exported_inspected_and_answers_as_its_checkpoint(source: Path, tmp_path: Path) -> None:
    patched, bundle, image = tmp_path / "patched", tmp_path / "bundle", tmp_path / "a.png"
    Image.new("RGB", (96, 64), (200, 30, 30)).save(image)
    assert run("patch", source, patched, "--pass", PVM).exit_code == 0
    exported = run("export", patched, bundle, "--dtype", "fp32", "--max-length", 64, "--json")
    assert (exported.exit_code, exported.stderr) == (0, "")
    assert json.loads(exported.stdout) == json.loads(run("inspect", bundle, "--json").stdout)
    assert "pvm at layers 1, 3" in run("inspect", bundle).stdout
    assert_refused(run("export", patched, bundle, "--dtype", "fp32"), "exists", "--overwrite")

    asked = ("--image", image, "--prompt", "Describe the picture.", "--max-new-tokens", 8)
    by_bundle, by_torch = (json.loads(run("generate", path, *asked, "--json").stdout) for path in (bundle, patched))
    assert by_bundle == by_torch
    assert run("generate", bundle, *asked).stdout == by_bundle["text"] + "\n"
    assert_refused(run("generate", bundle, "--prompt", "long " * 100), "64")
    (bundle / "decoder.onnx").unlink()
    assert_refused(run("generate", bundle, *asked), "decoder.onnx is missing")
