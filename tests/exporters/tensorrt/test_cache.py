"""The build cache: two models never share an entry, and a damaged one is built again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

from exporters.tensorrt import cache
from exporters.tensorrt.cache import BuildCache, weights_digest
from exporters.tensorrt.errors import EngineError
from surgeon.checkpoint import read_header


def model(folder: Path, values: np.ndarray) -> ir.Model:
    """A graph over a tensor in a file of other tensors."""
    folder.mkdir()
    save_file({"other": np.zeros(3, np.float32), "w": values}, folder / "w.safetensors")
    info = read_header(folder / "w.safetensors")["w"]
    tensor = ir.ExternalTensor(
        "w.safetensors",
        info.offset,
        info.nbytes,
        ir.DataType.FLOAT,
        shape=ir.Shape(values.shape),
        name="w",
        base_dir=folder,
    )
    weight = ir.Value(name="w", shape=ir.Shape(values.shape), type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor)
    x = ir.val("x", ir.DataType.FLOAT, values.shape)
    node = ir.node("Add", [x, weight])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 20})
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("piece", [64 << 20, 1000])
def test_two_fine_tunes_of_one_model_have_different_digests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    """Headers, shapes, sizes, and the first and last bytes of every tensor are the same."""
    monkeypatch.setattr(cache, "_CHUNK", piece)
    values = np.zeros(1 << 16, np.float32)
    tuned = values.copy()
    tuned[1 << 15] = 1e-6
    a, b, c = (model(tmp_path / name, each) for name, each in (("a", values), ("b", tuned), ("c", values.copy())))
    assert weights_digest(a, tmp_path / "a") != weights_digest(b, tmp_path / "b")
    assert weights_digest(a, tmp_path / "a") == weights_digest(c, tmp_path / "c")


@pytest.mark.parametrize("part", ["graph", "weights", "library", "targets", "profiles"])
def test_everything_that_an_engine_depends_on_is_in_its_key(part: str) -> None:
    parts = {
        "graph": "1",
        "weights": "2",
        "library": ["tensorrt-rtx", "1.7"],
        "targets": ["sm89"],
        "profiles": [{"x": [[1], [1], [4]]}],
    }
    assert BuildCache.key(parts) == BuildCache.key(dict(reversed(parts.items())))
    assert BuildCache.key(parts) != BuildCache.key(parts | {part: ["other"]})


def test_entries_are_checked_when_used(tmp_path: Path) -> None:
    kept = BuildCache(tmp_path / "cache")
    (engine := tmp_path / "engine").write_bytes(b"engine" * 100)
    assert kept.take("k", tmp_path / "none", dict) is None
    kept.put("k", engine, {"layers": 1})
    assert kept.take("k", tmp_path / "a", dict) == {"layers": 1}
    assert (tmp_path / "a").read_bytes() == engine.read_bytes()
    # what is taken is not the entry itself: writing to it would reach later builds
    assert (tmp_path / "a").stat().st_ino != (tmp_path / "cache" / "k" / "engine").stat().st_ino
    (tmp_path / "cache" / "k" / "engine").write_bytes(b"other")
    with pytest.warns(UserWarning, match="damaged: it is built again"):
        assert kept.take("k", tmp_path / "b", dict) is None
    assert kept.take("k", tmp_path / "b", dict) is None and not (tmp_path / "b").exists()
    kept.put("k", engine, {"layers": 2})
    assert kept.take("k", tmp_path / "c", dict) == {"layers": 2}


@pytest.mark.parametrize("damage", [lambda r: r.pop("kept"), lambda r: r.update(kept={}), lambda r: r.update(kept=[1])])
def test_an_entry_without_what_belongs_to_the_engine_is_built_again(
    tmp_path: Path, damage: Callable[[dict[str, Any]], Any]
) -> None:
    kept = BuildCache(tmp_path / "cache")
    (engine := tmp_path / "engine").write_bytes(b"engine")
    kept.put("k", engine, {"layers": 1})
    result = tmp_path / "cache" / "k" / "result.json"
    content = json.loads(result.read_text())
    damage(content)
    result.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="damaged: it is built again"):
        assert kept.take("k", tmp_path / "a", lambda value: value["layers"]) is None
    assert not (tmp_path / "a").exists() and not (tmp_path / "cache" / "k").exists()


def test_a_file_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match="is no directory"):
        BuildCache(tmp_path / "file")
