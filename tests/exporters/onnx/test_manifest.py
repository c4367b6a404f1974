"""bundle.json: what was written is read back, and a bundle that is not what it says is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from exporters.onnx.manifest import Manifest
from pairs import Pair
from surgeon.errors import BundleError


@pytest.fixture
def bundle(export: Callable[..., Pair], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(export("qwen3_vl").bundle, tmp_path / "bundle"))


def test_a_copy_of_a_bundle_is_the_bundle(bundle: Path, export: Callable[..., Pair]) -> None:
    assert Manifest.load(bundle) == export("qwen3_vl").manifest


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def weights(bundle: Path) -> Path:
    return bundle / "weights" / "model-base.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: (b / "bundle.json").unlink(), "is no bundle"),
        (lambda b: edit(b / "bundle.json", format=99), "format 99"),
        (lambda b: edit(b / "bundle.json", surprise=1), "surprise"),
        (lambda b: edit(b / "bundle.json", max_length="long"), "max_length"),
        (lambda b: edit(b / "bundle.json", visibility="some"), "visibility: .*'causal' or 'all'"),
        (lambda b: (b / "bundle.json").write_text("{"), "JSON"),
        (lambda b: (b / "decoder.onnx").unlink(), "decoder.onnx is missing"),
        (lambda b: flip(b / "decoder.onnx", 100), "decoder.onnx is not the file"),
        (lambda b: weights(b).unlink(), "model-base.safetensors is missing"),
        (lambda b: weights(b).write_bytes(b""), "has 0 bytes"),
        (lambda b: flip(weights(b), 20), "model-base.safetensors is not the file"),
    ],
)
def test_a_damaged_bundle_is_told(bundle: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(bundle)
    with pytest.raises(BundleError, match=message) as error:
        Manifest.load(bundle)
    assert "\n" not in str(error.value)


def test_a_bundle_from_before_there_was_a_choice_shows_its_memory_to_all(bundle: Path) -> None:
    described = json.loads((bundle / "bundle.json").read_text())
    del described["visibility"]
    (bundle / "bundle.json").write_text(json.dumps(described | {"format": 2}))
    assert Manifest.load(bundle).visibility == "all"


def test_a_checkpoint_is_not_a_bundle(export: Callable[..., Pair]) -> None:
    with pytest.raises(BundleError, match="surgeon export"):
        Manifest.load(export("qwen3_vl").checkpoint)
