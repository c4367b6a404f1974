"""The model card of a bundle: what the hub reads of it, and what it says comes true."""

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from huggingface_hub import ModelCard

from cards import blocks, card_of, section
from checkpoints import has_tokenizer, tiny_checkpoint
from command import run
from exporters.calibration.calibrate import not_measured
from exporters.export import export_bundle
from exporters.onnx.manifest import NOT_ASKED, Activation, Manifest, Precision
from exporters.onnx.model_card import bundle_card
from pairs import image, open_gates
from patching import apply
from surgeon.checkpoint import Checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LENGTH = 1500
pytestmark = pytest.mark.skipif(not has_tokenizer(), reason="needs the demo's tokenizer")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as `surgeon patch` writes it, beside its source."""
    folder = tmp_path_factory.mktemp("bundle-card")
    tiny_checkpoint(folder / "Tiny-VL", "internvl", num_hidden_layers=2)
    apply(folder / "Tiny-VL", folder / "patched", "pvm:layers=1,latent=32", seed=5)
    return folder / "patched"


@pytest.fixture(scope="module")
def bundle(fresh: Path) -> Path:
    export_bundle(fresh, fresh.parent / "bundle", dtype=torch.float32, max_length=LENGTH)
    return fresh.parent / "bundle"


def commands(directory: Path, heading: str, **places: Path) -> list[list[str]]:
    """The words behind `surgeon` of every command line under a heading, names replaced by places."""
    lines = [line for block in blocks(section(directory, heading), "bash") for line in block.splitlines()]
    words = [[str(places.get(word.replace("-", "_"), word)) for word in shlex.split(line)] for line in lines]
    assert all(line[0] == "surgeon" for line in words)
    return [line[1:] for line in words]


def content(directory: Path) -> dict[str, bytes]:
    """Every file; of the manifest not how weight files came here, which depends on the file system."""
    files = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    if "bundle.json" in files:
        files["bundle.json"] = re.sub(rb'"how": "(reflink|hardlink|copy)"', b"", files["bundle.json"])
    return files


def test_what_the_hub_reads(fresh: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(fresh, tmp_path / "hub" / "models--org--Tuned-VL" / "snapshots" / COMMIT))
    metadata = "license: other\nlicense_link: LICENSE\nlanguage: en\nbase_model: org/ancestor\nmetrics: [accuracy]"
    (checkpoint / "README.md").write_text(f"---\n{metadata}\n---\n# Theirs\n")
    (checkpoint / "LICENSE").write_text("Research only.")
    export_bundle(checkpoint, tmp_path / "bundle", dtype=torch.float32, max_length=64, graphs=["embed"], digests=False)
    assert card_of(tmp_path / "bundle").data.to_dict() == {
        "base_model": "org/Tuned-VL",
        "language": "en",
        "library_name": "onnx",
        "license": "other",
        "license_link": "LICENSE",
        "pipeline_tag": "image-text-to-text",
        "tags": ["surgeon", "pvm", "onnx"],
    }
    assert (tmp_path / "bundle" / "LICENSE").read_text() == "Research only."
    text = (tmp_path / "bundle" / "README.md").read_text()
    assert COMMIT in text and "| which was made of | `Tiny-VL` |" in text
    assert str(tmp_path) not in text and "Theirs" not in text
    (python,) = blocks(section(tmp_path / "bundle", "Recipe"), "python")
    source_named = re.sub(r'"org/Tuned-VL"|\'org/Tuned-VL\'', repr(str(checkpoint)), python)
    assert "graphs=['embed'], digests=False" in source_named
    exec(compile(source_named.replace('"BUNDLE"', repr(str(tmp_path / "again"))), "README.md", "exec"), {})
    assert content(tmp_path / "again") == content(tmp_path / "bundle")


def test_the_recipe_makes_the_same_bundle(fresh: Path, bundle: Path, tmp_path: Path) -> None:
    places = {"Tiny_VL": fresh.parent / "Tiny-VL", "patched": tmp_path / "patched", "BUNDLE": tmp_path / "again"}
    steps = commands(bundle, "Recipe", **places)
    assert [step[0] for step in steps] == ["patch", "export"]
    for step in steps:
        done = run(*step)
        assert done.exit_code == 0, done.output
    assert content(tmp_path / "patched") == content(fresh)
    assert content(tmp_path / "again") == content(bundle)


def test_what_it_names_runs(fresh: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image(60, 60).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    (ask,) = commands(bundle, "Use", BUNDLE=bundle)
    compared, bytes_too = commands(bundle, "Validation", BUNDLE=bundle, patched=fresh)
    for words in ([*ask, "--max-new-tokens", "2"], [*compared, "--steps", "2"], bytes_too):
        done = run(*words)
        assert done.exit_code == 0, done.output
    (python,) = blocks(section(bundle, "Use"), "python")
    exec(compile(python.replace("=64", "=2").replace("BUNDLE", str(bundle)), "README.md", "exec"), {})


def test_it_tells_what_is_in_the_bundle(bundle: Path) -> None:
    about, manifest = section(bundle, "What is in it"), Manifest.load(bundle)
    assert len(manifest.graphs) == 4
    for name, graph in manifest.graphs.items():
        loaded = onnx.load(bundle / graph.file, load_external_data=False)
        assert f"| `{name}.onnx` | `{loaded.graph.input[0].name}`" in about
        assert all(f"{entry.domain or 'ai.onnx'} {entry.version}" in about for entry in loaded.opset_import)
    for path, weights in manifest.weights.items():
        assert f"| `{path}` | {weights.bytes:,} | as it was |" in about
    assert manifest.source.fingerprint in about and "| float32 |" in about and "| 1,500 tokens" in about
    assert "- `pvm`: layers 1; latent 32; visibility causal" in about
    assert "**Its grafts are not trained.**" in card_of(bundle).text


def written(checkpoint: Path, bundle: Path, **changes: Any) -> str:
    """The card of the bundle if its manifest were another, or its checkpoint."""
    manifest = Manifest.load(bundle).model_copy(update=changes)
    with Checkpoint.open(checkpoint) as opened:
        return bundle_card(opened, manifest, bundle, None)


NARROW = Activation(graph="vision", layer="model.vision_tower.layers.1", operator="Mul", value="mul", max_abs=2e5)
MEASURED = Precision(limit=65504.0, margin=4.0, prompts=5)
WIDENED = MEASURED.model_copy(update={"widened": [NARROW, NARROW.model_copy()]})


@pytest.mark.parametrize(
    ("precision", "sentence", "options"),
    [
        (None, "fp32", "--dtype fp32 --max-length 1500\n"),
        (MEASURED, "over 5 prompts, with a margin of 4: no layer needs fp32 for that", "--max-length 1500\n"),
        (
            MEASURED.model_copy(update={"widened": [NARROW, NARROW.model_copy()]}),
            "1 layer computes in fp32 for that",
            "1500\n",
        ),
        (not_measured("/home/me has no room"), "was not measured; `precision` in bundle.json says why", "1500\n"),
        (not_measured(NOT_ASKED), "was not measured", "--max-length 1500 --no-measure\n"),
    ],
)
def test_what_is_said_of_overflow(
    fresh: Path, bundle: Path, precision: Precision | None, sentence: str, options: str
) -> None:
    text = written(fresh, bundle, precision=precision)
    assert sentence in text and options in text and "/home/me" not in text


def test_each_precision_has_its_runtimes(fresh: Path, bundle: Path) -> None:
    fp32, fp16, bf16 = (written(fresh, bundle, dtype=dtype) for dtype in ("float32", "float16", "bfloat16"))
    assert "surgeon engine" not in fp32 and "surgeon engine" in fp16 and "surgeon engine" in bf16
    assert "no bf16 kernels" not in fp16 and "no bf16 kernels" in bf16
    assert "with pvm in ONNX, fp16\n" in fp16 and "--dtype bf16 " in bf16


def test_of_open_gates_nothing_is_claimed(fresh: Path, bundle: Path, tmp_path: Path) -> None:
    """The recipe of the checkpoint is that of closed ones."""
    checkpoint = Path(shutil.copytree(fresh, tmp_path / "patched"))
    open_gates(checkpoint)
    text = written(checkpoint, bundle)
    assert "not trained" not in text and "surgeon patch" not in text and "surgeon export patched BUNDLE" in text


def test_a_plain_model_has_one_too(fresh: Path, bundle: Path) -> None:
    text = written(fresh.parent / "Tiny-VL", bundle)
    assert ModelCard(text).data.tags == ["surgeon", "onnx"] and "# Tiny-VL in ONNX, fp32\n" in text
    assert "graft" not in text and "patched" not in text


def test_digests_are_promised_where_there_are_some(fresh: Path, bundle: Path) -> None:
    assert "surgeon validate BUNDLE --bytes" in written(fresh, bundle)
    weights = {path: file.model_copy(update={"sha256": None}) for path, file in Manifest.load(bundle).weights.items()}
    text = written(fresh, bundle, weights=weights)
    assert "--bytes" not in text and "--max-length 1500 --no-digests\n" in text


@pytest.mark.parametrize(
    ("graphs", "without", "said"),
    [
        (["vision"], "", "some of a model's graphs alone"),
        (None, "tokenizer", "no tokenizer or image processor"),
    ],
)
def test_what_cannot_be_asked_is_not_said_to_answer(
    fresh: Path, tmp_path: Path, graphs: list[str] | None, without: str, said: str
) -> None:
    checkpoint = Path(shutil.copytree(fresh, tmp_path / "checkpoint"))
    for file in checkpoint.glob(f"{without}*.json") if without else ():
        file.unlink()
    export_bundle(checkpoint, tmp_path / "bundle", dtype=torch.float32, max_length=LENGTH, graphs=graphs, digests=False)
    use = section(tmp_path / "bundle", "Use")
    assert said in use and "surgeon generate" not in use


def test_tiles_that_go_elsewhere_are_no_identity(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "source", "internvl", num_hidden_layers=2)
    apply(tmp_path / "source", tmp_path / "patched", "mixin:layers=1,tiles=memory")
    export_bundle(tmp_path / "patched", tmp_path / "bundle", dtype=torch.float32, max_length=64, graphs=["embed"])
    text = (tmp_path / "bundle" / "README.md").read_text()
    assert "so they add nothing" in text and "identity" not in text


@pytest.mark.parametrize("how", ["reflink", "hardlink", "copy", "converted"])
def test_weights_are_told_as_they_came(fresh: Path, bundle: Path, how: str) -> None:
    weights = {path: file.model_copy(update={"how": how}) for path, file in Manifest.load(bundle).weights.items()}
    text = written(fresh, bundle, weights=weights)
    assert ("| converted to float32 |" in text) == (how == "converted")
    assert ("| as it was |" in text) == (how != "converted")
