"""The Python of docs/usage.md runs, block after block, as a reader would type it."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import has_tokenizer, tiny_checkpoint
from published import golden_checkpoint

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "usage.md").read_text()
CHART = ROOT / "surgeon" / "parity" / "data" / "chart.png"


def shortened(block: str) -> str:
    """As it is but for its sizes: how many tokens, and how deep a model, say nothing here."""
    block = re.sub(r"(max_new_tokens|steps)=64", r"\1=2", block)
    return block.replace("8,16,24", "0,1,3").replace("[8, 16, 24]", "[0, 1, 3]")


@pytest.mark.skipif(not has_tokenizer(), reason="the demo checkpoint, whose tokenizer it needs, is not there")
def test_the_blocks_run_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_checkpoint(tmp_path / "Qwen3-VL-8B-Instruct", "qwen3_vl", num_hidden_layers=4)
    golden_checkpoint(tmp_path / "InternVL2-2B")
    shutil.copy(CHART, tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"torch": torch}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) > 10
    for block in blocks:
        if "longer_inputs" in block:  # whose inputs are the reader's
            continue
        exec(compile(shortened(block), "docs/usage.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "passed" in printed and "qwen3_vl 4" in printed
    assert names["parameters"] == sum(p.numel() for n, p in names["model"].named_parameters() if ".pvm." in n)
    assert all((tmp_path / name).is_dir() for name in ("patched", "trained", "bundle", "internvl2"))


@pytest.mark.skipif(not has_tokenizer(), reason="the demo checkpoint, whose tokenizer it needs, is not there")
def test_the_readmes_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_checkpoint(tmp_path / "Qwen3-VL-8B-Instruct", "qwen3_vl", num_hidden_layers=4)
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(compile(shortened(block), "README.md", "exec"), {})
    assert capsys.readouterr().out.splitlines()[-1] == "passed"
