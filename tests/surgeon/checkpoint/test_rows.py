"""Rows in a copy of a weight file, and a weight file with a larger table."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import tiny_checkpoint
from surgeon.checkpoint.headers import read_header, read_metadata
from surgeon.checkpoint.reader import Checkpoint
from surgeon.checkpoint.rows import rewrite_file, write_rows
from surgeon.checkpoint.writer import PlannedTensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_go_where_they_belong_and_nowhere_else(tmp_path: Path, dtype: torch.dtype) -> None:
    file = tmp_path / "a.safetensors"
    tensors = {"a": torch.arange(5, dtype=dtype), "table": torch.randn(6, 4).to(dtype), "z": torch.ones(3, dtype=dtype)}
    save_file(tensors, file)
    values = torch.randn(2, 4).to(dtype)
    assert write_rows(file, read_header(file)["table"], [5, 0], values) == 8 * dtype.itemsize
    after = load_file(file)
    assert torch.equal(after["table"][[5, 0]], values) and torch.equal(after["table"][1:5], tensors["table"][1:5])
    assert torch.equal(after["a"], tensors["a"]) and torch.equal(after["z"], tensors["z"])


def test_rows_that_are_none_of_the_table_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"table": torch.zeros(6, 4)}, file)
    before, info = file.read_bytes(), read_header(file)["table"]
    for rows, values in (([6], torch.ones(1, 4)), ([-1], torch.ones(1, 4)), ([0], torch.ones(1, 5)),
                         ([0], torch.ones(1, 4).half()), ([0, 1], torch.ones(1, 4))):  # fmt: skip
        with pytest.raises(ValueError, match="table"):
            write_rows(file, info, rows, values)
    assert file.read_bytes() == before


def test_a_file_is_written_anew_in_its_order_with_its_metadata(tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path / "source", "qwen3_vl")
    with Checkpoint.open(directory) as source:
        (file,) = source.files
        key = "lm_head.weight"
        larger = torch.cat([source.read(key), torch.ones(1, 64)])
        planned = PlannedTensor(key, larger.dtype, tuple(larger.shape), lambda: larger)
        counts: list[int] = []
        size = rewrite_file(source, file, tmp_path / "new.safetensors", {key: planned}, counts.append)
        assert size == (tmp_path / "new.safetensors").stat().st_size and sum(counts) <= size
        written = read_header(tmp_path / "new.safetensors")
        assert list(written) == list(source.tensors)
        assert read_metadata(tmp_path / "new.safetensors") == read_metadata(file)
        content = load_file(tmp_path / "new.safetensors")
        assert torch.equal(content.pop(key), larger)
        assert all(torch.equal(tensor, source.read(name)) for name, tensor in content.items())
