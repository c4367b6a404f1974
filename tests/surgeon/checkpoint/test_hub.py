from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from surgeon.checkpoint.hub import resolve
from surgeon.errors import CheckpointError


def no_download(*args: Any, **kwargs: Any) -> str:
    raise AssertionError("asked the hub")


def test_a_directory_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_download)
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == Path("org/name")


@pytest.mark.parametrize("missing", ["./org/name", "/no/such", "a/b/c", "name", "../x", "org/", Path("org/name")])
def test_what_looks_like_a_path_is_never_asked_of_the_hub(
    missing: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such directory"):
        resolve(missing)


def test_a_file_is_not_a_directory(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a file"):
        resolve(tmp_path / "model.safetensors")


def test_hub_id_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []

    def download(repo: str, revision: str | None, **kwargs: Any) -> str:
        asked.append((repo, revision))
        return str(tmp_path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("Qwen/Qwen3-VL-8B-Instruct", "v1") == tmp_path
    assert asked == [("Qwen/Qwen3-VL-8B-Instruct", "v1")]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.GatedRepoError, "gated.*hf auth login"),
        (errors.RepositoryNotFoundError, "no directory 'org/name' here, and no such model"),
        (errors.RevisionNotFoundError, "no revision 'v1'"),
        (errors.LocalEntryNotFoundError, "hub cannot be reached"),
        (errors.OfflineModeIsEnabled, "hub cannot be reached"),
        (OSError, "cannot download org/name@v1: first line$"),
        (errors.HTTPError, "cannot download org/name@v1: first line$"),
    ],
)
def test_hub_errors_are_one_line(
    kind: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*args: Any, **kwargs: Any) -> str:
        error = kind.__new__(kind)
        error.args = ("first line\nsecond line",)
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve("org/name", "v1")
    assert "\n" not in str(caught.value)
