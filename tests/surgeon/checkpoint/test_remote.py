"""A hub id that is only described: its weight files stay on the hub, and are seen as if they were here."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from checkpoints import tiny_checkpoint
from hub_stand_in import Hub, hub
from surgeon.checkpoint import Checkpoint, read_header
from surgeon.errors import CheckpointError

REPO = "org/tiny"


@pytest.fixture(params=["sharded", "single"])
def served(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl", sharded=request.param == "sharded")
    monkeypatch.chdir(tmp_path)
    with hub(REPO, source, tmp_path / "cache", monkeypatch) as stand_in:
        yield stand_in


def weight_files(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*.safetensors"))


def test_headers_alone_are_fetched(served: Hub, tmp_path: Path) -> None:
    with Checkpoint.open(served.directory) as here, Checkpoint.open(REPO, weights="optional") as there:
        assert there.config == here.config and there.dtype == here.dtype
        assert [file.name for file in there.files] == [file.name for file in here.files]
        for info in here.tensors.values():
            remote = there.tensors[info.name]
            assert (remote.file.name, remote.shape, remote.dtype) == (info.file.name, info.shape, info.dtype)
            assert (remote.offset, remote.nbytes) == (info.offset, info.nbytes)
        assert there.tensors.keys() == here.tensors.keys()
        assert weight_files(tmp_path / "cache") == []
        for file in here.files:  # the client asks for the first 100 kB
            assert served.served[file.name] <= 100_001 < file.stat().st_size
        with pytest.raises(CheckpointError, match="safetensors, is missing"):
            there.read(next(iter(there.tensors)))


def test_who_wants_values_gets_the_files_and_they_are_used_from_then_on(served: Hub, tmp_path: Path) -> None:
    Checkpoint.open(REPO, weights="optional").close()
    with Checkpoint.open(REPO) as checkpoint, Checkpoint.open(served.directory) as here:
        assert checkpoint.fingerprint() == here.fingerprint()
    before = served.served.copy()
    with Checkpoint.open(REPO, weights="optional") as checkpoint:
        assert checkpoint.read(next(iter(checkpoint.tensors))).numel()
    assert all(served.served[file.name] == before[file.name] for file in checkpoint.files)


def test_what_is_cached_is_read_without_the_hub(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    Checkpoint.open(REPO).close()
    monkeypatch.setattr("surgeon.checkpoint.remote.HfApi", None)
    with Checkpoint.open(REPO, weights="optional") as checkpoint:
        assert checkpoint.tensors


def test_a_weight_file_that_is_damaged_on_the_hub(served: Hub) -> None:
    file = weight_files(served.directory)[0]
    read_header(file)
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])
    with pytest.raises(CheckpointError, match=f"org/tiny: {file.name} on the hub is not safetensors"):
        Checkpoint.open(REPO, weights="optional")


def test_a_shard_that_the_hub_does_not_have(served: Hub) -> None:
    files = weight_files(served.directory)
    if len(files) == 1:
        files[0].unlink()
        with Checkpoint.open(REPO, weights="optional") as checkpoint:
            assert checkpoint.files == []
        return
    files[0].unlink()
    with pytest.raises(
        CheckpointError, match=rf"{files[0].name}, which model.safetensors.index.json names, is missing"
    ):
        Checkpoint.open(REPO, weights="optional")


def test_a_hub_that_is_gone_after_the_config_came(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    Checkpoint.open(REPO, weights="optional").close()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(CheckpointError, match=r"^cannot download org/tiny: .+$"):
        Checkpoint.open(REPO, weights="optional")


def test_what_would_be_read_in_two_ways_is_refused_there_too(served: Hub) -> None:
    other = (
        "model.safetensors.index.json" if (served.directory / "model.safetensors").is_file() else "model.safetensors"
    )
    file = sorted(served.directory.glob("*.safetensors"))[0]
    if other == "model.safetensors":
        (served.directory / other).write_bytes(file.read_bytes())
    else:
        (served.directory / other).write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(CheckpointError, match="two sets of weights"):
        Checkpoint.open(REPO, weights="optional")


def test_an_adapter_is_refused_there_too(served: Hub) -> None:
    (served.directory / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="a PEFT adapter"):
        Checkpoint.open(REPO, weights="optional")
