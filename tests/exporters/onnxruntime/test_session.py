import shutil
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from exporters.onnxruntime import BundleRuntime, SessionOptions, choose_provider
from exporters.onnxruntime.session import Session
from pairs import MIXIN, PVM, Pair
from surgeon.errors import BundleError


@pytest.fixture
def bundle(export: Callable[..., Pair]) -> Path:
    return export("qwen3_vl").bundle


def test_provider() -> None:
    assert choose_provider("cpu") == "cpu"
    if choose_provider("auto") == "cpu":
        with pytest.raises(BundleError, match="the CUDA provider does not work here: .*; use --backend ort-cpu"):
            choose_provider("cuda")
    else:
        assert choose_provider("cuda") == "cuda"
    with pytest.raises(BundleError, match="unknown provider 'rocm'"):
        choose_provider("rocm")  # type: ignore[arg-type]


def test_nothing_is_written(bundle: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in sorted(bundle.rglob("*"))}
    Session(bundle / "decoder.onnx", SessionOptions(threads=1))
    assert {path: path.stat().st_mtime_ns for path in sorted(bundle.rglob("*"))} == before


def test_a_bundle_may_be_moved_and_named_from_anywhere(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(bundle, tmp_path / "a" / "moved")
    monkeypatch.chdir(tmp_path / "a")
    session = BundleRuntime("moved").embed
    monkeypatch.chdir(tmp_path)
    assert session.inputs.keys() == {"input_ids"}


def test_weights_of_another_size(bundle: Path, tmp_path: Path) -> None:
    """What the manifest's check did not see, because the session was made by hand."""
    shutil.copytree(bundle, tmp_path / "bundle")
    for path in (tmp_path / "bundle" / "weights").iterdir():
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(BundleError, match=r"decoder\.onnx: .* takes 16384 bytes, and lies at"):
        Session(tmp_path / "bundle" / "decoder.onnx", SessionOptions())


def test_a_missing_graph(bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"other\.onnx is missing"):
        Session(bundle / "other.onnx", SessionOptions())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_host_sees_float32(export: Callable[..., Pair], dtype: torch.dtype) -> None:
    path = export("qwen3_vl", MIXIN + PVM, dtype).bundle / "decoder.onnx"
    session = Session(path, SessionOptions(threads=1))
    types = {v.name: v.type for v in (*session.session.get_inputs(), *session.session.get_outputs())}
    for name in ("inputs_embeds", "deepstack", "logits"):
        assert types[name] == "tensor(float)"
    # fp16 caches stay fp16; bf16 ones are bf16 numbers in fp32, because the CPU provider computes nothing in bf16
    assert types["past_keys.0"] == types["present_keys.0"]
    assert types["past_keys.0"] == ("tensor(float16)" if dtype == torch.float16 else "tensor(float)")
    assert ir.load(path).graph.inputs[0].dtype == {torch.float16: ir.DataType.FLOAT16}.get(dtype, ir.DataType.BFLOAT16)
