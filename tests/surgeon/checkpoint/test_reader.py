import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgeon.checkpoint import Checkpoint
from surgeon.errors import CheckpointError

SHARDS = {
    "model-00001-of-00002.safetensors": {"b": torch.arange(8.0).reshape(2, 4), "a": torch.ones(3)},
    "model-00002-of-00002.safetensors": {"c": torch.full((2,), 5.0)},
}


def write_config(directory: Path, **keys: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen3_vl", **keys}))
    return directory


def write_index(directory: Path, weight_map: Any) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def single(tmp_path: Path) -> Path:
    directory = write_config(tmp_path / "single")
    save_file({"w": torch.randn(4, 4).bfloat16(), "n": torch.ones(2)}, directory / "model.safetensors")
    return directory


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    directory = write_config(tmp_path / "sharded")
    for file, tensors in SHARDS.items():
        save_file(tensors, directory / file)
    write_index(directory, {name: file for file, tensors in SHARDS.items() for name in tensors})
    return directory


def as_hub_cache(source: Path, root: Path) -> Path:
    """The source's files in the Hugging Face cache's layout: blobs by hash, and a snapshot of symlinks to them."""
    snapshot = root / "models--org--name" / "snapshots" / "0123abc"
    blobs = root / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(sorted(source.iterdir())):
        shutil.copy(path, blobs / f"{i:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{i:064x}")
    return snapshot


def test_single_file(single: Path) -> None:
    with Checkpoint.open(single) as checkpoint:
        assert checkpoint.files == [single / "model.safetensors"]
        assert checkpoint.config["model_type"] == "qwen3_vl"
        assert checkpoint.dtype == torch.bfloat16  # 16 elements against 2
        expected = load_file(single / "model.safetensors")
        assert set(checkpoint.tensors) == set(expected)
        assert all(torch.equal(checkpoint.read(name), expected[name]) for name in expected)
        with pytest.raises(CheckpointError, match="no tensor 'v'"):
            checkpoint.read("v")


def test_shards_in_the_order_of_the_index(sharded: Path) -> None:
    first, second = SHARDS
    write_index(sharded, {"c": second, "a": first, "b": first})
    checkpoint = Checkpoint.open(sharded)
    assert [path.name for path in checkpoint.files] == list(SHARDS)[::-1]
    for tensors in SHARDS.values():
        for name, tensor in tensors.items():
            assert torch.equal(checkpoint.read(name), tensor)


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_hub_cache_of_symlinks(layout: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source: Path = request.getfixturevalue(layout)
    (source / "tokenizer.json").write_text("{}")
    snapshot = as_hub_cache(source, tmp_path / "hub")
    plain, cached = Checkpoint.open(source), Checkpoint.open(snapshot)
    assert [path.name for path in cached.files] == [path.name for path in plain.files]
    assert all(path.parent == snapshot for path in cached.files)
    assert [path.name for path in cached.side_files] == ["tokenizer.json"]
    assert all(torch.equal(cached.read(name), plain.read(name)) for name in plain.tensors)
    assert cached.fingerprint() == plain.fingerprint()

    blob = Path(os.path.realpath(cached.files[-1]))
    blob.unlink()
    with pytest.raises(CheckpointError, match="link to a file that is gone"):
        Checkpoint.open(snapshot)


def test_writing_into_a_tensor_does_not_reach_the_file_and_release_keeps_it_valid(single: Path) -> None:
    before = (single / "model.safetensors").read_bytes()
    checkpoint = Checkpoint.open(single)
    tensor = checkpoint.read("n")
    tensor.fill_(9)
    assert (single / "model.safetensors").read_bytes() == before
    checkpoint.release("n")
    assert torch.equal(tensor, torch.ones(2))
    checkpoint.close()
    assert torch.equal(tensor, torch.ones(2))
    assert torch.equal(checkpoint.read("n"), torch.ones(2))


def test_reading_maps_and_release_gives_the_memory_back(tmp_path: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    size = 64 << 20
    save_file({"w": torch.ones(size // 4)}, write_config(tmp_path / "big") / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "big")
    start = resident()
    tensor = checkpoint.read("w")
    assert resident() - start < size // 4
    assert tensor.sum() == size // 4
    assert resident() - start > size // 2
    checkpoint.release("w")
    assert resident() - start < size // 4


def test_unaligned_tensors(tmp_path: Path) -> None:
    header = json.dumps(
        {
            "flag": {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]},
            "w": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
        }
    ).encode()
    data = b"\x01" + torch.tensor([1.5, -2.0]).numpy().tobytes()
    path = write_config(tmp_path / "odd") / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    tensor = Checkpoint.open(tmp_path / "odd").read("w")
    assert tensor.tolist() == [1.5, -2.0]
    assert tensor.data_ptr() % 4 == 0


def test_side_files(single: Path) -> None:
    keep = ["chat_template.jinja", "generation_config.json", "merges.txt", "modeling.py", "tokenizer.model"]
    drop = [".gitattributes", "pytorch_model.bin", "optimizer.pt", "model.gguf", "extra.safetensors"]
    drop += ["other.safetensors.index.json", "pytorch_model.bin.index.json"]
    for name in keep + drop:
        (single / name).touch()
    (single / "onnx").mkdir()
    (single / "onnx" / "config.json").touch()
    assert [path.name for path in Checkpoint.open(single).side_files] == keep


def test_dtype_counts_elements_and_prefers_more_than_8_bits(tmp_path: Path) -> None:
    directory = write_config(tmp_path / "q", text_config={"dtype": "float16"})
    assert Checkpoint.open(directory, weights="optional").dtype == torch.float16
    older = write_config(tmp_path / "older", torch_dtype="bfloat16")  # as transformers wrote it before its version 5
    assert Checkpoint.open(older, weights="optional").dtype == torch.bfloat16
    tensors = {"w": torch.zeros(100).to(torch.float8_e4m3fn), "e": torch.zeros(20).bfloat16(), "s": torch.zeros(2)}
    save_file({**tensors, "ids": torch.zeros(500, dtype=torch.int64)}, directory / "model.safetensors")
    assert Checkpoint.open(directory).dtype == torch.bfloat16


def test_fingerprint_sees_config_names_and_both_ends_of_a_tensor(tmp_path: Path) -> None:
    def fingerprint(file: str = "model-1.safetensors", change: tuple[int, float] | None = None, **config: Any) -> str:
        directory = tmp_path / str(len(seen))
        write_config(directory, **config)
        tensor = torch.zeros(10_000)
        if change:
            tensor[change[0]] = change[1]
        save_file({"w": tensor}, directory / file)
        write_index(directory, {"w": file})
        return Checkpoint.open(directory).fingerprint()

    seen: list[str] = []
    seen.append(fingerprint())
    assert fingerprint() == seen[0]
    seen += [fingerprint(hidden=1)]
    seen += [fingerprint(file="model-2.safetensors")]
    seen += [fingerprint(change=(0, 1.0))]
    seen += [fingerprint(change=(9_999, 1.0))]
    assert len(set(seen)) == 5


def test_fingerprint_ignores_the_config_s_layout(single: Path) -> None:
    before = Checkpoint.open(single).fingerprint()
    (single / "config.json").write_text(json.dumps(json.loads((single / "config.json").read_text()), indent=4) + "\n")
    assert Checkpoint.open(single).fingerprint() == before


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"c": "gone.safetensors"}, "gone.safetensors.*is missing"),
        ({"a": "../model.safetensors"}, "outside the directory"),
        ({"a": "sub/../../model.safetensors"}, "outside the directory"),
        ({"a": "/etc/model.safetensors"}, "outside the directory"),
        ({"a": "..\\model.safetensors"}, "outside the directory"),
        ({"a": "pytorch_model.bin"}, "not a .safetensors file"),
        ({"a": 3}, "not a .safetensors file"),
        ({}, "no weight_map"),
        (["a"], "no weight_map"),
        ({**dict.fromkeys("abx", list(SHARDS)[0]), "c": list(SHARDS)[1]}, "lists x, which .*00001.* does not hold"),
        ({"a": list(SHARDS)[0], "c": list(SHARDS)[1]}, "holds b, which .* lists not at all"),
        ({"a": list(SHARDS)[0], "b": list(SHARDS)[1], "c": list(SHARDS)[1]}, "holds b, which .* lists as in .*00002"),
    ],
)
def test_bad_index(sharded: Path, weight_map: Any, message: str) -> None:
    save_file({"a": torch.ones(3)}, sharded.parent / "model.safetensors")  # what a path outside would find
    write_index(sharded, weight_map)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(sharded)


def test_truncated_shard(sharded: Path) -> None:
    shard = sharded / list(SHARDS)[1]
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="00002-of-00002.*truncated"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickle_weights_are_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    directory = write_config(tmp_path / "pickled")
    (directory / name).write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=f"{name}.*run any code.*safe_serialization=True"):
        Checkpoint.open(directory)


def test_config_alone(tmp_path: Path) -> None:
    directory = write_config(tmp_path / "config")
    with pytest.raises(CheckpointError, match="no weights: neither"):
        Checkpoint.open(directory)
    checkpoint = Checkpoint.open(directory, weights="optional")
    assert (checkpoint.tensors, checkpoint.files, checkpoint.dtype) == ({}, [], torch.float32)
    assert len(checkpoint.fingerprint()) == 64


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "not a checkpoint: it has no config.json"),
        ("{", "config.json is not JSON"),
        ("[]", "config.json holds a JSON list"),
        ("{}", "no model_type"),
        (b"\xff\xff", "is not JSON"),
    ],
)
def test_not_a_checkpoint(tmp_path: Path, config: str | bytes | None, message: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_bytes(config if isinstance(config, bytes) else config.encode())
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


def test_adapter_is_named_as_one(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="PEFT adapter"):
        Checkpoint.open(tmp_path)


# -- weights that would be read in two ways ------------------------------------------------------------------------
def test_an_index_of_the_single_file_alone(single: Path) -> None:
    write_index(single, dict.fromkeys("wn", "model.safetensors"))
    assert set(Checkpoint.open(single).tensors) == {"w", "n"}
    write_index(single, {"w": "model.safetensors"})
    with pytest.raises(CheckpointError, match="holds n, which .* lists not at all"):
        Checkpoint.open(single)


@pytest.mark.parametrize("shards", [{}, {"model.safetensors": {"d": torch.ones(1)}}])
def test_a_single_file_beside_an_index_of_others(sharded: Path, shards: dict[str, Any]) -> None:
    """Whether or not the index names it too: transformers reads no other then."""
    save_file({"d": torch.zeros(1)}, sharded / "model.safetensors")
    write_index(sharded, {name: file for file, tensors in {**SHARDS, **shards}.items() for name in tensors})
    with pytest.raises(CheckpointError, match=r"two sets of weights.*00001-of-00002.* and 1 more.*remove"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("weights", ["required", "optional"])
def test_an_adapter_beside_the_weights(single: Path, weights: Any) -> None:
    (single / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: a PEFT adapter .*merge"):
        Checkpoint.open(single, weights)


@pytest.mark.parametrize(("name", "usable"), [("model.safetensors", True), ("other.safetensors", False), (3, False)])
def test_weights_that_the_config_names(single: Path, name: Any, usable: bool) -> None:
    write_config(single, transformers_weights=name)
    if usable:
        Checkpoint.open(single)
    else:
        with pytest.raises(CheckpointError, match="transformers_weights names other weights"):
            Checkpoint.open(single)
