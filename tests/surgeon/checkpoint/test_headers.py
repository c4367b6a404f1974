import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from surgeon.checkpoint.headers import read_header, read_metadata
from surgeon.errors import CheckpointError


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_offsets_are_absolute_and_metadata_is_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3), "s": torch.tensor(7)}, path, {"format": "pt"})
    tensors = read_header(path)
    assert set(tensors) == {"w", "s"}
    info = tensors["w"]
    assert (info.dtype, info.shape, info.nbytes, info.numel, info.torch_dtype) == (
        "BF16",
        (2, 3),
        12,
        6,
        torch.bfloat16,
    )
    assert path.read_bytes()[info.offset : info.offset + 4] == bytes([0, 0, 0x80, 0x3F])  # 0 and 1 in bfloat16
    assert read_metadata(path) == {"format": "pt"}


def test_sub_byte_dtypes_are_listed_but_have_no_torch_dtype(tmp_path: Path) -> None:
    info = read_header(write_raw(tmp_path / "a", {"q": entry("F4", [2, 4], 0, 4)}, bytes(4)))["q"]
    assert info.nbytes == 4
    with pytest.raises(CheckpointError, match="q is F4"):
        _ = info.torch_dtype


def test_truncated_file_names_expected_and_found_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(100)}, path)
    whole = path.read_bytes()
    for size in (len(whole) - 1, 20, 8, 3, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=rf"a\.safetensors.*the file has {size}") as caught:
            read_header(path)
        if size == len(whole) - 1:
            assert f"says {len(whole)} bytes" in str(caught.value)
    path.write_bytes(whole + b"x")
    with pytest.raises(CheckpointError, match="bytes of no tensor"):
        read_header(path)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"not json at all", 0, "not JSON"),
        (b"\xff\xfe{}", 0, "not JSON"),
        (b"[1, 2]", 0, "JSON list"),
        (b'{"a": 1}', 0, "not an object"),
        (b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"a":{}}', 1, "occurs twice"),
        ({"a": entry("Q8", [1], 0, 1)}, 1, "unknown dtype 'Q8'"),
        ({"a": {"dtype": "U8", "shape": [1]}}, 1, "data_offsets None"),
        ({"a": entry("U8", [-1], 0, 1)}, 1, "shape"),
        ({"a": entry("U8", [True], 0, 1)}, 1, "shape"),
        ({"a": entry("U8", [1], 1, 0)}, 1, "data_offsets"),
        ({"a": entry("F32", [3], 0, 8)}, 8, "needs 12 bytes, its data_offsets span 8"),
        ({"a": entry("F4", [3], 0, 2)}, 2, "needs 2 bytes, its"),
        ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, 6, "overlaps a"),
        ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 5, 9)}, 9, "hole after a"),
        ({"a": entry("U8", [4], 1, 5)}, 5, "hole after the header"),
        ({"a": entry("U8", [10**300], 0, 4)}, 4, "needs 1000"),
    ],
)
def test_corrupt_header(tmp_path: Path, header: Any, data: int, message: str) -> None:
    path = write_raw(tmp_path / "a.safetensors", header, bytes(data))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_what_is_no_safetensors_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read"):
        read_header(tmp_path / "missing.safetensors")
    with pytest.raises(CheckpointError, match="cannot read"):
        read_header(tmp_path)
    pointer = tmp_path / "pointer.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(CheckpointError, match="git-lfs"):
        read_header(pointer)


def test_a_tensor_without_elements_lies_where_the_next_begins(tmp_path: Path) -> None:
    """Whichever the header names first."""
    two = {"w": entry("F32", [2], 0, 8), "none": entry("F32", [0, 4], 0, 0)}
    for names in (("w", "none"), ("none", "w")):
        tensors = read_header(write_raw(tmp_path / "a", {name: two[name] for name in names}, bytes(8)))
        assert (tensors["none"].nbytes, tensors["w"].nbytes) == (0, 8)
