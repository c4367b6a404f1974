"""Links beside the weights are followed within the checkpoint and the hub's cache, and nowhere else."""

import os
from pathlib import Path

import pytest
from huggingface_hub import constants

from checkpoints import tiny_checkpoint
from command import assert_refused, run
from patching import apply
from surgeon.checkpoint.reader import Checkpoint
from surgeon.errors import CheckpointError

PVM = "pvm:layers=1,latent=32"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "source", "qwen3_vl")


@pytest.mark.parametrize("command", ["patch", "export"])
@pytest.mark.parametrize("relative", [False, True])
def test_a_link_out_of_the_checkpoint_is_refused(source: Path, tmp_path: Path, command: str, relative: bool) -> None:
    (tmp_path / "secret").write_text("{}")
    (source / "notes.json").symlink_to("../secret" if relative else tmp_path / "secret")
    arguments = ("--pass", PVM) if command == "patch" else ("--dtype", "fp32", "--max-length", 16)
    done = run(command, source, tmp_path / "out", *arguments)
    assert_refused(done, str(source / "notes.json"), f"a link to {tmp_path / 'secret'}", "put the file itself there")
    assert not (tmp_path / "out").exists()


def test_a_link_to_nothing_is_refused(source: Path) -> None:
    (source / "vocab.json").symlink_to("gone.json")
    with pytest.raises(CheckpointError, match=r"vocab.json is a link to .*gone.json, which is not there"):
        _ = Checkpoint.open(source).side_files


def test_a_link_within_the_checkpoint_is_copied(source: Path, tmp_path: Path) -> None:
    (source / "deep").mkdir()
    (source / "deep" / "notes.json").write_text("{}")
    (source / "notes.json").symlink_to("deep/notes.json")
    apply(source, tmp_path / "out", PVM)
    copied = tmp_path / "out" / "notes.json"
    assert copied.read_text() == "{}" and not copied.is_symlink()


def snapshot_of(source: Path, cache: Path) -> Path:
    """The checkpoint as the hub's client lays it out."""
    repository = cache / "models--someone--model"
    snapshot, blobs = repository / "snapshots" / "0123abcd", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(source.iterdir()):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / str(number), snapshot))
    return snapshot


def test_a_snapshot_of_any_cache_is_copied(source: Path, tmp_path: Path) -> None:
    snapshot = snapshot_of(source, tmp_path / "cache")
    (tmp_path / "model").symlink_to(snapshot)  # and a name for it
    for number, directory in enumerate((snapshot, tmp_path / "model")):
        apply(directory, tmp_path / str(number), PVM)
        assert (tmp_path / str(number) / "tokenizer.json").is_file()
    (snapshot / "tokenizer.json").unlink()
    (tmp_path / "secret").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../../../secret")
    with pytest.raises(CheckpointError, match=r"tokenizer.json is a link to .*secret, outside"):
        apply(snapshot, tmp_path / "out", PVM)


def test_a_directory_of_links_to_what_was_downloaded_is_copied(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = snapshot_of(source, tmp_path / "cache")
    (tmp_path / "mine").mkdir()
    for path in snapshot.iterdir():
        (tmp_path / "mine" / path.name).symlink_to(path)
    with pytest.raises(CheckpointError, match="outside the directory"):
        apply(tmp_path / "mine", tmp_path / "out", PVM)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    apply(tmp_path / "mine", tmp_path / "out", PVM)
    (tmp_path / "cache" / "token").write_text("{}")
    (tmp_path / "mine" / "notes.json").symlink_to(tmp_path / "cache" / "token")
    with pytest.raises(CheckpointError, match="notes.json is a link to"):
        apply(tmp_path / "mine", tmp_path / "again", PVM)


def test_weights_on_another_disk_are_followed(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").rename(tmp_path / "weights.safetensors")
    (source / "model.safetensors").symlink_to(tmp_path / "weights.safetensors")
    apply(source, tmp_path / "out", PVM)
    assert (tmp_path / "out" / "model-base.safetensors").stat().st_size == (source / "model.safetensors").stat().st_size
