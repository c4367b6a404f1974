"""What long work says of itself: of each stage how much is done, never less than before, and in the end all of it."""

import io
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpoints import tiny_checkpoint
from exporters.export import export_bundle
from exporters.validation.validate import validate_bytes, validate_pair
from patching import apply
from published import golden_checkpoint
from surgeon.importing import import_checkpoint
from surgeon.progress import Progress, progress_bars


def steps_of(work: Callable[[Progress], object]) -> list[str]:
    """The stages of some work in their order, each checked."""
    seen: dict[str, list[tuple[int, int]]] = defaultdict(list)

    def progress(stage: str, done: int, total: int) -> None:
        assert (type(stage), type(done), type(total)) == (str, int, int)
        seen[stage].append((done, total))

    work(progress)
    for stage, counts in seen.items():
        assert [done for done, _ in counts] == sorted(done for done, _ in counts), stage
        assert len({total for _, total in counts}) == 1 and counts[-1][0] == counts[-1][1], stage
    return list(seen)


def test_every_stage_ends_with_all_of_it(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl", num_hidden_layers=1)
    patched, bundle = tmp_path / "patched", tmp_path / "bundle"
    assert steps_of(lambda p: apply(source, patched, "pvm:layers=0,latent=32", progress=p)) == [
        "weights",
        "new tensors",
    ]
    exported = steps_of(lambda p: export_bundle(patched, bundle, dtype=torch.float16, max_length=256, progress=p))
    assert exported == [
        "tracing graphs", "tracing decoder layers", "converting to float16", "digests", "measuring activations",
    ]  # fmt: skip
    assert steps_of(lambda p: validate_bytes(bundle, progress=p)) == ["digests"]
    golden = golden_checkpoint(tmp_path / "golden")
    imported = steps_of(lambda p: import_checkpoint(golden, tmp_path / "out", image_token_id=500, progress=p))
    assert imported == ["weights"]
    validated = steps_of(lambda p: validate_pair(source, patched, prompt="Hi", steps=1, progress=p))
    assert validated == ["loading", "comparing, as they are"]


def test_bars_are_drawn_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with progress_bars() as progress:
        assert progress is None
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress_bars() as progress:
        assert progress is not None
        progress("weights", 3, 8)
        progress("weights", 8, 8)
        progress("new tensors", 200_000, 400_000)
    assert "weights" in terminal.getvalue() and "200.0 kB/400.0 kB" in terminal.getvalue()
