"""A Triton model repository: its config against the published schema, its model.py in front of a stand-in for Triton.

Triton itself is not run here.
"""

import importlib.util
import io
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format

from checkpoints import has_tokenizer
from command import run
from exporters.onnxruntime import BundleRuntime
from exporters.serving import triton
from exporters.tensorrt import runtime as runtimes
from exporters.tensorrt.errors import EngineError
from exporters.tensorrt.profiles import Limits, Range
from pairs import MIXIN, PVM, Pair, image
from rehearsal import CpuDevice, make_engines
from surgeon.errors import TargetError
from surgeon.generation import Sampling
from surgeon.inputs import Prompt

pytestmark = pytest.mark.skipif(not has_tokenizer(), reason="the demo checkpoint is not there")
LIMITS = Limits(prefill=Range.of(1, 48), batch=Range.of(1, 1), image_tokens=Range.of(1, 100))
FINAL = 1


@pytest.fixture(scope="module")
def schema() -> Any:
    """model_config_pb2 as Triton's client carries it; loaded by itself, without what sends requests."""
    spec = importlib.util.find_spec("tritonclient")
    assert spec is not None and spec.submodule_search_locations
    path = Path(next(iter(spec.submodule_search_locations))) / "grpc" / "model_config_pb2.py"
    module_spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def test_the_config_is_of_the_published_schema(schema: Any) -> None:
    parsed = text_format.Parse(triton.config("demo"), schema.ModelConfig())
    assert (parsed.name, parsed.backend, parsed.max_batch_size) == ("demo", "python", 0)
    assert parsed.model_transaction_policy.decoupled
    assert list(parsed.version_policy.specific.versions) == [1]
    inputs = {
        port.name: (schema.DataType.Name(port.data_type), list(port.dims), port.optional) for port in parsed.input
    }
    assert inputs == {
        "prompt": ("TYPE_STRING", [1], False),
        "images": ("TYPE_STRING", [-1], True),
        "max_tokens": ("TYPE_INT32", [1], True),
        "temperature": ("TYPE_FP32", [1], True),
        "positions": ("TYPE_STRING", [1], True),
    }
    assert [port.name for port in parsed.output] == ["text", "finish_reason"]
    (group,) = parsed.instance_group
    assert group.kind == schema.ModelInstanceGroup.Kind.KIND_MODEL and group.count == 1
    with pytest.raises(text_format.ParseError):  # what the check is worth
        text_format.Parse(triton.config("demo").replace("decoupled", "coupled"), schema.ModelConfig())


# -- the repository ----------------------------------------------------------------------------------------------
def test_it_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def broken(path: Path) -> None:
        path.mkdir()
        raise EngineError("no")

    with pytest.raises(EngineError):
        triton.write_repository(tmp_path / "out", broken)
    assert not list(tmp_path.iterdir())
    assert triton.write_repository(tmp_path / "My model!", lambda path: path.mkdir()) is None
    files = sorted(str(path.relative_to(tmp_path / "My model!")) for path in (tmp_path / "My model!").rglob("*"))
    name = "My_model"
    assert files == [name, f"{name}/1", f"{name}/1/engines", f"{name}/1/model.py", f"{name}/config.pbtxt"]
    with pytest.raises(TargetError, match="exists"):
        triton.write_repository(tmp_path / "My model!", lambda path: path.mkdir())
    with pytest.raises(EngineError, match="gives no name"):
        triton.model_name(Path("--"))


def test_the_command(export: Callable[..., Pair], tmp_path: Path, schema: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engines themselves are built in tests/exporters/tensorrt; here their place is what matters."""
    from exporters.tensorrt import build, report

    pair = export("qwen3_vl", PVM)

    class Built:
        report = types.SimpleNamespace(warnings=list)
        manifest = None

    def built(bundle: Path, target: Path, options: Any, **_: Any) -> type[Built]:
        make_engines(pair, target, LIMITS)
        return Built

    monkeypatch.setattr(build, "build_engines", built)
    monkeypatch.setattr(report, "built_json", lambda built: {"built": True})
    arguments = ["engine", str(pair.bundle), str(tmp_path / "demo"), "--serve-layout", "triton", "--target", "sm89"]
    refused = run(*arguments, "--graph", "embed")
    assert refused.exit_code == 2 and "a server needs the engines of all graphs" in refused.stderr
    done = run(*arguments, "--json")
    assert (done.exit_code, json.loads(done.stdout)) == (0, {"built": True})
    version = tmp_path / "demo" / "demo" / "1"
    text_format.Parse((version.parent / "config.pbtxt").read_text(), schema.ModelConfig())
    assert (version / "engines" / "engine.json").is_file() and (version / "engines" / "processor").is_dir()


# -- model.py ----------------------------------------------------------------------------------------------------
class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        self.name, self.array = name, array

    def as_numpy(self) -> np.ndarray:
        return self.array


class Response:
    def __init__(self, output_tensors: tuple[Tensor, ...] = (), error: Any = None) -> None:
        self.outputs = {tensor.name: tensor.array[0].decode() for tensor in output_tensors}
        self.error = error


class Request:
    """What the backend passes, and what it was sent."""

    def __init__(self, cancel_after: int | None = None, **inputs: Any) -> None:
        self.inputs = {name: Tensor(name, np.asarray(value)) for name, value in inputs.items()}
        self.sent: list[Response] = []
        self.ended = False
        self.cancel_after = cancel_after

    def get_response_sender(self) -> "Request":
        return self

    def is_cancelled(self) -> bool:
        return self.cancel_after is not None and len(self.sent) >= self.cancel_after

    def send(self, response: Response | None = None, flags: int = 0) -> None:
        assert not self.ended
        if response is not None:
            self.sent.append(response)
        self.ended = flags == FINAL

    @property
    def text(self) -> str:
        return "".join(response.outputs["text"] for response in self.sent)


@pytest.fixture
def bundle(export: Callable[..., Pair]) -> BundleRuntime:
    return BundleRuntime(export("internvl", (*MIXIN, *PVM, "rope-dhr")).bundle, threads=1)


@pytest.fixture
def model(export: Callable[..., Pair], bundle: BundleRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model.py of a repository, as Triton loads it."""
    utils = types.ModuleType("triton_python_backend_utils")
    utils.Tensor, utils.InferenceResponse, utils.TritonError = Tensor, Response, str  # type: ignore[attr-defined]
    utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL  # type: ignore[attr-defined]
    utils.get_input_tensor_by_name = lambda request, name: request.inputs.get(name)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)
    monkeypatch.setattr(runtimes, "check_runnable", lambda path, manifest: None)
    monkeypatch.setattr(runtimes, "CudaDevice", lambda backend: CpuDevice())
    pair = export("internvl", (*MIXIN, *PVM, "rope-dhr"))
    triton.write_repository(tmp_path / "demo", lambda path: make_engines(pair, path, LIMITS))
    spec = importlib.util.spec_from_file_location("model", tmp_path / "demo" / "demo" / "1" / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loaded = module.TritonPythonModel()
    loaded.initialize({"model_repository": str(tmp_path / "demo" / "demo"), "model_version": "1"})
    return loaded


IMAGE = image(84, 84)


def png() -> bytes:
    file = io.BytesIO()
    IMAGE.save(file, "PNG")
    return file.getvalue()


def text(value: str) -> np.ndarray:
    return np.array([value.encode()], dtype=object)


def test_it_streams_what_the_runtime_answers(model: Any, bundle: BundleRuntime) -> None:
    asked: dict[str, Any] = {"prompt": text("What is it?"), "images": np.array([png()], dtype=object)}
    requests = [
        Request(**asked, max_tokens=np.array([30], np.int32)),
        Request(
            prompt=text("A star is a"), max_tokens=np.array([30], np.int32), temperature=np.array([0.7], np.float32)
        ),
        Request(**asked, max_tokens=np.array([30], np.int32), positions=text("plain")),
    ]
    model.execute(requests)
    prompt = Prompt("What is it?", (IMAGE,))
    (greedy,) = bundle.generate([prompt], 30)
    (sampled,) = bundle.generate([Prompt("A star is a")], 30, Sampling(float(np.float32(0.7))))
    (plain,) = bundle.generate([prompt], 30, positions="plain")
    for request, expected in zip(requests, (greedy, sampled, plain), strict=True):
        assert request.ended and request.text == expected.text
        assert [response.error for response in request.sent] == [None] * len(request.sent)
        assert len(request.sent) > 2  # as it is made
        assert [response.outputs["finish_reason"] for response in request.sent][-2:] == ["", expected.finish_reason]
    assert greedy.text != plain.text


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({"images": np.array([b"no image"], dtype=object)}, "image-0 is not an image"),
        ({"images": np.array([b"\0\0\0 ftypisom" + b"\0" * 99], dtype=object)}, "video is not supported yet"),
        ({"positions": text("dhl")}, "positions is 'dhl'; there are dhr and plain"),
        ({"max_tokens": np.array([0], np.int32)}, "max_tokens is 0"),
        ({"temperature": np.array([np.nan], np.float32)}, "temperature is nan"),
        ({"prompt": text("word " * 400)}, "the bundle was exported for 256"),
        ({"prompt": np.array([b"a", b"b"], dtype=object)}, "prompt has 2 values, expected one"),
        ({"prompt": np.array([b"\xff"], dtype=object)}, "not UTF-8"),
    ],
)
def test_a_bad_request_is_told_why_and_the_next_is_answered(model: Any, inputs: dict, expected: str) -> None:
    bad = Request(**{"prompt": text("What?"), **inputs})
    good = Request(prompt=text("What?"), max_tokens=np.array([2], np.int32))
    model.execute([bad, good])
    (response,) = bad.sent
    assert bad.ended and expected in response.error and "\n" not in response.error
    assert "/" not in response.error  # no path of the server's
    assert good.ended and good.sent[-1].outputs["finish_reason"]


def test_a_cancelled_request_ends(model: Any) -> None:
    request = Request(cancel_after=2, prompt=text("What?"), max_tokens=np.array([40], np.int32))
    model.execute([request])
    assert request.ended and len(request.sent) == 2
