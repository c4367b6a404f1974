"""engine.json: a wrong directory of engines is refused by name."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporters.tensorrt.errors import EngineError
from exporters.tensorrt.library import Gpu
from exporters.tensorrt.manifest import EngineManifest

ROOT = Path(__file__).resolve().parents[3]
Copy = Callable[..., Path]


@pytest.fixture
def copy(engines: Any, tmp_path: Path) -> Copy:
    """copy(key=value, ...) -> a copy of engines whose engine.json has these entries."""

    def make(**changes: Any) -> Path:
        target = tmp_path / "engines"
        shutil.copytree(engines()[1], target)
        path = target / "engine.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return target

    return make


def test_a_fresh_process_reads_it_from_the_directory_alone(copy: Copy) -> None:
    code = (
        "import sys; from exporters.tensorrt.manifest import EngineManifest as M; m = M.load(sys.argv[1]);"
        "print(m.library.backend, m.targets, m.dtype, m.bundle.sizes.hidden_size, m.plugins, "
        "m.engines['decoder'].profiles[1].sizes['S'].max, 'tensorrt_rtx' in sys.modules, 'onnxruntime' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(copy())], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[0] == "tensorrt-rtx ['sm80', 'sm89', 'sm120'] float16 64 [] 256 False False"


def test_what_is_no_directory_of_engines(tmp_path: Path, copy: Copy) -> None:
    with pytest.raises(EngineError, match=r"has no engine.json: make engines of a bundle with `surgeon engine`"):
        EngineManifest.load(tmp_path)
    (tmp_path / "engine.json").write_text("{")
    with pytest.raises(EngineError, match="the file: Invalid JSON"):
        EngineManifest.load(tmp_path)
    with pytest.raises(EngineError, match="format 99, this version of surgeon reads up to 1; update surgeon"):
        EngineManifest.load(copy(format=99))


def test_an_unknown_entry_is_refused(copy: Copy) -> None:
    with pytest.raises(EngineError, match="surprise"):
        EngineManifest.load(copy(surprise=1))


def test_damaged_engines(copy: Copy) -> None:
    directory = copy()
    path = directory / "decoder.engine"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(EngineError, match=r"decoder.engine is damaged or another: its digest"):
        EngineManifest.load(directory)
    EngineManifest.load(directory, verify=False)
    path.write_bytes(data[:-1])
    with pytest.raises(EngineError, match=r"bytes instead of [\d,]+: it is damaged"):
        EngineManifest.load(directory, verify=False)
    path.unlink()
    with pytest.raises(EngineError, match=r"decoder.engine is missing"):
        EngineManifest.load(directory)


def test_another_library_gpu_or_bundle(engines: Any, tmp_path: Path) -> None:
    bundle, directory, _ = engines()
    manifest = EngineManifest.load(directory)
    manifest.check_library()
    manifest.check_library(manifest.library.version)
    with pytest.raises(EngineError, match=rf"of tensorrt-rtx {manifest.library.version}, here is 1.8.0: build them"):
        manifest.check_library("1.8.0")
    manifest.check_gpu(Gpu("NVIDIA L40", "sm89"))
    with pytest.raises(EngineError, match=r"for sm80, sm89, sm120, here is NVIDIA H200 \(sm90\): build them with"):
        manifest.check_gpu(Gpu("NVIDIA H200", "sm90"))
    with pytest.raises(EngineError, match="CUDA finds none here"):
        manifest.check_gpu(None)
    manifest.check_bundle(bundle)
    with pytest.raises(EngineError, match="is no bundle"):
        manifest.check_bundle(tmp_path)
    other = tmp_path / "bundle.json"
    other.write_bytes((bundle / "bundle.json").read_bytes() + b" ")
    with pytest.raises(EngineError, match="of another bundle than"):
        manifest.check_bundle(tmp_path)
