"""`surgeon validate --bytes`: one byte that differs anywhere in what was recorded is reported, with the file's name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpoints import tiny_checkpoint
from command import assert_refused, run
from exporters.export import export_bundle
from exporters.onnx.digests import sha256_of_files
from exporters.onnx.manifest import Manifest, sha256
from exporters.tensorrt.profiles import Limits, Range
from pairs import Pair
from patching import apply
from rehearsal import make_engines

Export = Callable[..., Pair]


@pytest.fixture
def bundle(export: Export, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(export("qwen3_vl").bundle, tmp_path / "bundle"))


def flip(path: Path) -> None:
    """One bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()  # it may share its bytes with another
    path.write_bytes(data)


def assert_reported(name: str, *arguments: object) -> None:
    done = run("validate", *arguments, "--bytes")
    assert done.exit_code == 1, done.output
    assert "bytes      FAILED" in done.stdout and "FAILED in" in done.stdout
    assert any(name in line for line in done.stdout.splitlines()[1:-1]), done.stdout
    assert json.loads(run("validate", *arguments, "--bytes", "--json").stdout)["verdict"] == "failed"


def test_an_untouched_bundle_passes(bundle: Path) -> None:
    done = run("validate", bundle, "--bytes")
    assert done.exit_code == 0, done.output
    (bundle / "README.md").write_text("a card that was edited, as cards are")
    files = [path for path in bundle.rglob("*") if path.is_file() and path.name not in ("bundle.json", "README.md")]
    assert f"{len(files)} files of {bundle} have the SHA-256 that was recorded" in done.stdout
    assert "passed in" in done.stdout


FILES = [
    "weights/model-base.safetensors",
    "weights/model-pvm.safetensors",
    "processor/tokenizer.json",
    "processor/preprocessor_config.json",
    "processor/config.json",
    "decoder.onnx",
    "memory.onnx",
]


@pytest.mark.parametrize("name", FILES)
def test_one_bit_of_a_bundle_is_told(bundle: Path, name: str) -> None:
    flip(bundle / name)
    assert_reported(name, bundle)


def test_files_that_are_missing_or_more_are_told(bundle: Path) -> None:
    (bundle / "processor" / "chat_template.json").write_text("{}")  # it would go before the recorded template
    assert_reported("processor/chat_template.json was not there", bundle)
    (bundle / "processor" / "chat_template.json").unlink()
    (bundle / "vision.onnx").unlink()
    assert_reported("vision.onnx is missing", bundle)


def test_a_pair_is_compared_before_anything_is_loaded(export: Export, bundle: Path, tmp_path: Path) -> None:
    checkpoint = export("qwen3_vl").checkpoint
    own = ("--prompt", "Hello!", "--steps", 1)
    result = run("validate", checkpoint, bundle, *own, "--bytes", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [check["name"] for check in report["checks"]].count("bytes") == 2 and report["comparisons"]
    flip(bundle / "decoder.onnx")  # which could not even be loaded
    assert_reported("decoder.onnx", checkpoint, bundle)

    # the checkpoint was altered after the export: in the middle of a tensor, which its fingerprint does not see
    altered = Path(shutil.copytree(checkpoint, tmp_path / "altered"))
    flip(altered / "model-base.safetensors")
    assert_reported("altered/model-base.safetensors is not the file", altered, export("qwen3_vl").bundle)
    other = tiny_checkpoint(tmp_path / "other", "qwen3_vl", num_hidden_layers=3, seed=1)
    assert_reported("was exported from patched", other, export("qwen3_vl").bundle)


def test_a_patched_checkpoint_holds_its_sources_bytes(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl", torch.bfloat16, num_hidden_layers=2)
    apply(source, tmp_path / "patched", "pvm:layers=1,latent=32")
    own = ("--prompt", "Hello!", "--steps", 1)
    result = run("validate", tmp_path / "patched", source, *own, "--bytes")
    assert result.exit_code == 0 and "byte for byte" in result.stdout, result.output
    altered = Path(shutil.copytree(tmp_path / "patched", tmp_path / "altered"))
    flip(altered / "model-base.safetensors")
    assert_reported("it has other values", source, altered)
    half = tiny_checkpoint(tmp_path / "half", "qwen3_vl", torch.float16, num_hidden_layers=2)
    assert_reported("it is stored as BF16, not F16", half, tmp_path / "patched")
    deeper = tiny_checkpoint(tmp_path / "deeper", "qwen3_vl", torch.bfloat16, num_hidden_layers=3)
    assert_reported("it is missing", deeper, tmp_path / "patched")
    assert "more tensor" in run("validate", deeper, tmp_path / "patched", "--bytes").stdout
    other = tiny_checkpoint(tmp_path / "other", "qwen3_vl", torch.bfloat16, num_hidden_layers=2, seed=1)
    assert_reported("was made of source", other, tmp_path / "patched")
    assert_refused(run("validate", tmp_path / "patched", "--bytes"), "nothing is recorded", "that it was made of")


def test_a_converted_bundle_is_of_one_checkpoint_alone(tmp_path: Path) -> None:
    """Nothing of the checkpoint's own bytes is in the bundle; what is compared was recorded as it was exported."""
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl", torch.bfloat16, num_hidden_layers=1)
    target = tmp_path / "bundle"
    export_bundle(source, target, dtype=torch.float32, max_length=64)
    done = run("validate", source, target, "--bytes", "--prompt", "Hi", "--steps", 1)
    assert done.exit_code == 0 and "and the SHA-256 of 1 weight file" in done.stdout, done.output
    flip(source / "model.safetensors")
    assert_reported("source/model.safetensors is not the file", source, target)


@pytest.mark.parametrize("how", ["altered", "missing"])
def test_the_code_that_travels_with_a_checkpoint_is_compared(how: str, tmp_path: Path) -> None:
    """transformers runs it where this tool is not installed."""
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl", num_hidden_layers=2)
    apply(source, tmp_path / "patched", "pvm:layers=1,latent=32")
    assert run("validate", source, tmp_path / "patched", "--bytes", "--prompt", "Hi", "--steps", 1).exit_code == 0
    file = tmp_path / "patched" / "surgeon_memory_pvm.py"
    text = file.read_text()
    file.unlink()
    if how == "altered":
        assert "F.silu" in text
        file.write_text(text.replace("F.silu", "F.gelu"))
    assert_reported("surgeon_memory_pvm.py is not what this version writes", source, tmp_path / "patched")


def test_engines(export: Export, bundle: Path, tmp_path: Path) -> None:
    pair = export("qwen3_vl", dtype=torch.float16)
    engines = make_engines(pair, tmp_path / "engines", Limits(prefill=Range.of(1, 48), batch=Range.of(1, 2)))
    done = run("validate", engines, "--bytes")
    assert done.exit_code == 0, done.output
    assert_reported("engines are of another bundle", bundle, engines)
    flip(engines / "processor" / "tokenizer.json")
    assert_reported("processor/tokenizer.json", engines)
    flip(engines / "processor" / "tokenizer.json")
    flip(next(engines.glob("decoder*.engine")))
    assert_reported(".engine", engines)


def test_a_bundle_without_digests_says_so(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl", num_hidden_layers=1)
    command = ("export", source, tmp_path / "bundle", "--dtype", "fp32", "--max-length", 64, "--no-digests")
    assert run(*command).exit_code == 0
    assert_refused(run("validate", tmp_path / "bundle", "--bytes"), "no digest of weights/", "export it again")


def test_a_bundle_of_before_says_that_it_does_not_know_its_checkpoint(export: Export, bundle: Path) -> None:
    written = json.loads((bundle / "bundle.json").read_text())
    del written["source"]["sha256"]
    (bundle / "bundle.json").write_text(json.dumps(written | {"format": 3}))
    command = ("validate", export("qwen3_vl").checkpoint, bundle, "--bytes")
    assert_refused(run(*command), "no digest of the weight files it was exported from", "export it again")


def test_one_path_alone_needs_bytes(bundle: Path) -> None:
    done = run("validate", bundle)
    assert done.exit_code == 2 and "--bytes" in done.stderr


def test_digests_are_those_of_whole_files_and_each_file_is_read_once(tmp_path: Path) -> None:
    files = [tmp_path / str(i) for i in range(4)]
    for i, path in enumerate(files[:3]):
        path.write_bytes(bytes([i]) * (i * 5_000_000))  # one is empty, two are longer than what is read at once
    files[3].hardlink_to(files[2])
    seen: list[tuple[int, int]] = []
    digests = sha256_of_files(files, lambda stage, done, total: seen.append((done, total)))
    assert digests == {path: sha256(path) for path in files}
    assert max(seen) == (15_000_000, 15_000_000)


def test_older_manifests_are_read(bundle: Path) -> None:
    written = json.loads((bundle / "bundle.json").read_text())
    for weights in written["weights"].values():
        del weights["sha256"]
    del written["processor"], written["source"]["sha256"]
    (bundle / "bundle.json").write_text(json.dumps(written | {"format": 2}))
    assert Manifest.load(bundle).format == 2
