"""ONNX Runtime sessions of a bundle's graphs."""

import difflib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch

from exporters.onnx.graph_file import read_graph
from exporters.onnx.manifest import GraphFile
from exporters.onnx.rewrite import Rewrite
from exporters.onnxruntime.custom_ops import Device, Fused, fuse
from exporters.onnxruntime.rewrites import (
    EmulateBFloat16,
    Float32Boundary,
    GroupedQueryAttention,
    PackedMultiHeadAttention,
    RoundFloat16,
)
from exporters.runtime.state import stays_on_device
from surgeon.errors import BundleError, SurgeonError
from surgeon.sizes import one_line

Provider = Literal["auto", "cpu", "cuda", "tensorrt-rtx"]
Chosen = Literal["cpu", "cuda", "tensorrt-rtx"]
Feeds = Mapping[str, "np.ndarray | ort.OrtValue"]

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
_NEEDS = {
    "cuda": ("CUDA", "install onnxruntime-gpu", "CUDA or cuDNN of the version that onnxruntime-gpu is built for"),
    "tensorrt-rtx": ("TensorRT-RTX", "`surgeon engine` needs none of it", "TensorRT for RTX and CUDA"),
}
"""How a provider is called, what to do where onnxruntime is built without it, and which libraries it loads."""
_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(double)": torch.float64,
}


@dataclass(frozen=True)
class SessionOptions:
    """How a bundle's graphs are run."""

    provider: Chosen = "cpu"
    threads: int | None = None
    """Threads of one operator; None: as many as there are physical cores."""
    low_memory: bool = False
    """Map weights from their files instead of packing them: no copy in memory, but slower (by about 40 % a token)."""
    fast_attention: bool = True
    """Rewrite attention to ONNX Runtime's own operators; TensorRT has none of them."""
    fused: Device | None = None
    """Where grafts run as fused kernels; None: they stay standard operators."""

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """Where caches and memory are, as torch and onnxruntime name it."""
        return "cpu" if self.provider == "cpu" else "cuda"


def choose_provider(provider: Provider) -> Chosen:
    """The execution provider to use: `auto` is CUDA where it works, else the CPU. Raises BundleError for one that
    does not work here."""
    if provider == "cpu":
        return "cpu"
    if provider not in ("auto", *_NEEDS):
        raise BundleError(f"unknown provider {provider!r}; there are auto, {', '.join(_PROVIDERS)}")
    chosen: Chosen = "cuda" if provider == "auto" else provider
    reason = _why_not(chosen)
    if reason is None:
        return chosen
    if provider != "auto":
        raise BundleError(
            f"the {_NEEDS[chosen][0]} provider does not work here: {reason}; use --backend ort-cpu, or none for the "
            "best that works"
        )
    return "cpu"


@cache
def _why_not(provider: Chosen) -> str | None:
    """What is missing for a provider; None where a session really uses it."""
    _, remedy, libraries = _NEEDS[provider]
    if _PROVIDERS[provider] not in ort.get_available_providers():
        return f"this onnxruntime is built without it ({remedy})"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    value = ir.val("x", ir.DataType.FLOAT, [1])
    node = ir.node("Identity", [value])
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "y", value.type, value.shape
    graph = ir.Graph([value], node.outputs, nodes=[node], name="probe", opset_imports={"": 17})
    options = ort.SessionOptions()
    options.log_severity_level = 4
    probe = ir.to_proto(ir.Model(graph, ir_version=9)).SerializeToString()
    # where its libraries do not load, the session is created without it
    session = ort.InferenceSession(probe, options, providers=[_PROVIDERS[provider], _PROVIDERS["cpu"]])
    if _PROVIDERS[provider] not in session.get_providers():
        return f"its libraries do not load ({libraries})"
    return None


class Session:
    """One graph of a bundle, rewritten for ONNX Runtime in memory; no file is written.

    Its inputs and outputs are fp32 wherever the graph has fp16 or bf16, but for those that stay on the device, whose
    names start with `past_`, `present_` or `memory_`.
    """

    def __init__(
        self,
        path: Path,
        options: SessionOptions,
        extra_outputs: Sequence[str] = (),
        graph_file: GraphFile | None = None,
        overrides: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """`extra_outputs`: names of values inside the graph that become outputs too, after its own. `graph_file`: the
        graph's entry in bundle.json. `overrides`: names of initialisers -> the value of all their elements, instead of
        those in the file.

        Raises BundleError for a graph that is missing, damaged or not as described, or a name that is not in it.
        """
        self.path, self.options = path, options
        self.rewrites: dict[str, int] = {}
        """How many nodes each rewrite replaced."""
        original = read_graph(path, graph_file)
        self.graph_dtypes = {str(v.name): v.dtype for v in (*original.graph.inputs, *original.graph.outputs)}
        try:
            self.session = self._make(
                original, lambda model: _with_overrides(_with_outputs(model, path, extra_outputs), overrides)
            )
        except SurgeonError:
            raise
        except Exception:
            _check_loads(path)  # a graph that is none; else a fault of the rewrites
            raise
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]

    def _make(self, model: ir.Model, changed: Callable[[ir.Model], ir.Model]) -> ort.InferenceSession:
        model, self.fused = _fuse(model, self.path, self.options.fused, changed)
        for rewrite in _rewrites(model, self.options):
            rewrite(model)
            self.rewrites[type(rewrite).__name__] = rewrite.replaced
        return _load(model, self.path, self.options, self.fused)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a floating input, as the session takes it."""
        return _DTYPES[self.inputs[name].type]

    def zeros(self, name: str, sizes: Mapping[str, int]) -> torch.Tensor:
        """Zeros on the session's device of an input's shape and dtype; `sizes`: of its symbolic dimensions."""
        shape = [n if isinstance(n, int) else sizes[n] for n in self.inputs[name].shape]
        return torch.zeros(shape, dtype=self.dtype(name), device=self.options.device)

    def bind(self, feeds: Feeds, outputs: Mapping[str, ort.OrtValue]) -> ort.IOBinding:
        """A binding of inputs and outputs: those in `outputs` are written there, memory onto the session's device,
        the others onto the host. It may be run again after some of it was bound anew."""
        binding = self.session.io_binding()
        self.bind_inputs(binding, feeds)
        for name in self.outputs:
            if name in outputs:
                binding.bind_ortvalue_output(name, outputs[name])
            else:
                self.bind_new_output(binding, name)
        return binding

    def bind_inputs(self, binding: ort.IOBinding, feeds: Feeds) -> None:
        for name, value in feeds.items():
            if isinstance(value, ort.OrtValue):
                binding.bind_ortvalue_input(name, value)
            else:
                binding.bind_cpu_input(name, self._as_input(name, value))

    def bind_new_output(self, binding: ort.IOBinding, name: str) -> None:
        """Let the next run allocate the output."""
        binding.bind_output(name, self.options.device if stays_on_device(name) else "cpu")

    def execute(self, binding: ort.IOBinding) -> dict[str, ort.OrtValue]:
        """Run a binding made by `bind`; -> all outputs."""
        self.session.run_with_iobinding(binding)
        return dict(zip(self.outputs, binding.get_outputs(), strict=True))

    def run(self, feeds: Feeds) -> dict[str, ort.OrtValue]:
        """Run once, all outputs newly allocated."""
        return self.execute(self.bind(feeds, {}))

    def _as_input(self, name: str, value: np.ndarray) -> np.ndarray:
        if value.dtype == np.float32 and self._rounds_inputs and self.graph_dtypes[name] == ir.DataType.BFLOAT16:
            value = torch.from_numpy(value).bfloat16().float().numpy()
        return np.ascontiguousarray(value)

    @property
    def _rounds_inputs(self) -> bool:
        return self.rewrites.get(EmulateBFloat16.__name__, 0) > 0


def as_tensor(value: ort.OrtValue) -> torch.Tensor:
    """The same memory as a torch tensor."""
    return torch.from_dlpack(value._ortvalue)


def as_value(tensor: torch.Tensor) -> ort.OrtValue:
    """The same memory as an OrtValue; `tensor` is contiguous."""
    return ort.OrtValue.from_dlpack(tensor)


def _rewrites(model: ir.Model, options: SessionOptions) -> Iterator[Rewrite]:
    dtypes = {value.dtype for value in (*model.graph.inputs, *model.graph.outputs)}
    # CUDA's contrib kernels for attention take fp16 and bf16 alone
    own = options.provider == "cpu" or (options.provider == "cuda" and ir.DataType.FLOAT not in dtypes)
    if options.fast_attention and own:
        yield GroupedQueryAttention()
        yield PackedMultiHeadAttention()
    if options.provider == "cpu":
        yield EmulateBFloat16()
        yield RoundFloat16()
    yield Float32Boundary(keep=stays_on_device)


def _fuse(
    model: ir.Model, path: Path, device: Device | None, changed: Callable[[ir.Model], ir.Model]
) -> tuple[ir.Model, Fused | None]:
    """A graph, read from `path`, after `changed`, with grafts as fused kernels where they compile."""
    model = changed(model)
    if device is None:
        return model, None
    try:
        return model, fuse(model, device)
    except SurgeonError as error:
        warnings.warn(f"{path.name}: {error}; standard operators stay", stacklevel=2)
        return changed(read_graph(path)), None


def _with_outputs(model: ir.Model, path: Path, names: Sequence[str]) -> ir.Model:
    """A graph with some of its values as outputs too."""
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    for name in names:
        if name not in values:
            near = difflib.get_close_matches(name, values, n=3)
            hint = f"; the nearest are {', '.join(near)}" if near else ""
            raise BundleError(f"{path.name} has no value named {name!r}{hint}")
        if values[name] not in model.graph.outputs:
            model.graph.outputs.append(values[name])
    return model


def _with_overrides(model: ir.Model, values: Mapping[str, float]) -> ir.Model:
    """Give initialisers other values, in `model` itself."""
    for name, value in values.items():
        if name not in model.graph.initializers:
            raise BundleError(f"the graph {model.graph.name} has no initialiser {name}")
        initializer = model.graph.initializers[name]
        assert initializer.shape is not None and initializer.dtype is not None
        shape = tuple(int(size) for size in initializer.shape)  # type: ignore[arg-type]
        initializer.const_value = ir.tensor(np.full(shape, value, initializer.dtype.numpy()), name=name)
    return model


def _load(model: ir.Model, path: Path, options: SessionOptions, fused: Fused | None) -> ort.InferenceSession:
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    if options.threads is not None:
        settings.intra_op_num_threads = options.threads
    if options.low_memory:
        settings.add_session_config_entry("session.disable_prepacking", "1")
    # the model comes as bytes: this is where its weight files are
    folder = str(path.parent.resolve())
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    if fused is not None:
        fused.register(settings)
    providers = [_PROVIDERS[name] for name in dict.fromkeys((options.provider, "cpu"))]
    try:
        return ort.InferenceSession(ir.to_proto(model).SerializeToString(), settings, providers=providers)
    except _LOAD_ERRORS as error:
        raise BundleError(f"{path}: onnxruntime cannot load it: {str(error).splitlines()[0]}") from error


def _check_loads(path: Path) -> None:
    """Raises BundleError for a file that onnxruntime does not take as it is."""
    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        ort.InferenceSession(path, settings, providers=[_PROVIDERS["cpu"]])
    except _LOAD_ERRORS as error:
        raise BundleError(f"{path}: onnxruntime cannot load it: {one_line(error)}; export the bundle again") from error


_native = ort.capi.onnxruntime_pybind11_state
_LOAD_ERRORS = (
    _native.Fail,
    _native.InvalidArgument,
    _native.InvalidGraph,
    _native.InvalidProtobuf,
    _native.NoSuchFile,
    _native.NotImplemented,
    _native.RuntimeException,
)
