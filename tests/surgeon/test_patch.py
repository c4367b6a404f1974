"""A patch of a source that changes while it is read is refused; nothing is left of it, and nothing says done."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import surgeon.patch
import surgeon.patched_weights
from checkpoints import tiny_checkpoint
from patching import apply
from surgeon.checkpoint.reader import Checkpoint
from surgeon.checkpoint.share import Shared
from surgeon.errors import SurgeonError, TargetError

PVM = "pvm:layers=1,latent=32"


@pytest.fixture(scope="module")
def original_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("patch") / "source", "qwen3_vl", sharded=True)


@pytest.fixture
def source(original_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original_checkpoint, tmp_path / "source"))


def once(change: Callable[[], object]) -> Callable[[str, int, int], None]:
    """A progress callback that makes a change when the first bytes of the weights are there."""
    pending = [change]

    def progress(stage: str, done: int, total: int) -> None:
        if pending:
            pending.pop()()

    return progress


def cut(path: Path, size: int = 1000) -> None:
    os.truncate(path, size)


def rewrite(path: Path) -> None:
    """Other bytes, as many."""
    path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))


def shards(source: Path) -> list[Path]:
    with Checkpoint.open(source) as checkpoint:
        return checkpoint.files


@pytest.mark.parametrize("mode", ["auto", "copy"])
@pytest.mark.parametrize(
    ("which", "change", "message"),
    [
        (lambda source: shards(source)[-1], cut, "to 1,000 bytes"),
        (lambda source: shards(source)[0], cut, "to 1,000 bytes"),
        (lambda source: shards(source)[-1], rewrite, "though not in size"),
        (lambda source: source / "tokenizer.json", cut, "to 1,000 bytes"),
    ],
    ids=["a shard that is still to be copied", "one that was copied", "other bytes, as many", "a side file"],
)
def test_a_source_that_changes_while_it_is_copied(
    source: Path, tmp_path: Path, mode: str, which: Callable[[Path], Path], change: Callable[[Path], None], message: str
) -> None:
    file = which(source)
    with pytest.raises(TargetError) as raised:
        apply(source, tmp_path / "out", PVM, weights=mode, progress=once(lambda: change(file)))
    assert all(part in str(raised.value) for part in (str(file), "changed while it was read", message, "out was not"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_source_that_is_cut_short_before_it_is_linked(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its header and its place in the output: no byte is copied that could be counted."""
    share = surgeon.patched_weights.share_file

    def cut_first(file: Path, *arguments: Any) -> Shared:
        if file.suffix == ".safetensors":
            cut(file)
        return share(file, *arguments)

    monkeypatch.setattr(surgeon.patched_weights, "share_file", cut_first)
    with pytest.raises(SurgeonError, match="changed while it was read"):
        apply(source, tmp_path / "out", PVM, weights="link")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: cut(next(d.glob("model-0*"))), "truncated"),
        (lambda d: cut(d / "model-pvm.safetensors", 5000), "truncated"),
        (lambda d: (d / "model-pvm.safetensors").unlink(), "model-pvm.safetensors.* is missing"),
        (lambda d: edit(d / "model.safetensors.index.json", lambda c: c["weight_map"].popitem()), "lists not at all"),
        (lambda d: edit(d / "config.json", lambda c: c["text_config"].update(num_hidden_layers=3)), "config.json"),
        (lambda d: edit(d / "config.json", lambda c: c.pop("surgeon")), "its record 'surgeon' is missing"),
    ],
)
def test_what_was_staged_is_read_before_it_is_put_in_place(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], Any], message: str
) -> None:
    """Whatever the reason: a disk that lies, or a fault of this tool."""
    write = surgeon.patch._write

    def damaged(graph: Any, checkpoint: Any, directory: Path, *arguments: Any) -> None:
        write(graph, checkpoint, directory, *arguments)
        damage(directory)

    monkeypatch.setattr(surgeon.patch, "_write", damaged)
    with pytest.raises(TargetError, match=f"out was not written, because it would not be whole: .*{message}"):
        apply(source, tmp_path / "out", PVM)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_tensors_of_another_dtype_than_planned_are_not_put_in_place(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is sound in itself and fits the config, and is not what was planned."""
    planned = surgeon.patch._planned

    def other(*arguments: Any) -> Any:
        import torch

        name = "model.language_model.norm.weight"
        return {**planned(*arguments), name: (torch.float16, planned(*arguments)[name][1])}

    monkeypatch.setattr(surgeon.patch, "_planned", other)
    with pytest.raises(TargetError, match=r"norm.weight was to be float16 \[64\] and is float32 \[64\]"):
        apply(source, tmp_path / "out", PVM)


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
