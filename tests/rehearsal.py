"""Directories of engines that run without a GPU, for tests of everything up to the device: each engine file is the
graph that TensorRT would be given, which ONNX Runtime runs from the addresses and shapes that are bound."""

import ctypes
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir
import torch

from exporters.onnx import manifest as bundles
from exporters.onnx.manifest import PROCESSOR
from exporters.onnxruntime import SessionOptions
from exporters.onnxruntime.session import Session
from exporters.tensorrt.device import Context, Device, Engine, Replay
from exporters.tensorrt.library import installed_version
from exporters.tensorrt.manifest import EngineFile, EngineManifest, LibraryUsed, digest
from exporters.tensorrt.profiles import Limits, make_profiles
from exporters.tensorrt.rewrites import rewrite
from pairs import Pair


def make_engines(pair: Pair, target: Path, limits: Limits, graphs: Sequence[str] = ()) -> Path:
    """As `surgeon engine` lays them out, of a bundle in any dtype."""
    target.mkdir()
    bundle = pair.bundle
    shutil.copytree(bundle / "weights", target / "weights")  # an engine has its own; these files are graphs
    shutil.copytree(bundle / PROCESSOR, target / PROCESSOR)
    profiles = make_profiles(bundle, pair.manifest, limits)
    engines = {}
    for name, graph in pair.manifest.graphs.items():
        if graphs and name not in graphs:
            continue
        model = ir.load(bundle / graph.file)
        replaced = rewrite(model)
        path = target / f"{name}.engine"
        path.write_bytes(ir.to_proto(model).SerializeToString())
        left = {value.name for value in model.graph.inputs}
        engines[name] = EngineFile(
            file=path.name,
            bytes=path.stat().st_size,
            sha256=digest(path),
            graph_sha256=digest(path),
            rewrites=replaced,
            profiles=profiles[name],
            inputs=[port for port in graph.inputs if port.name in left],
            outputs=graph.outputs,
        )
    EngineManifest(
        tool_version="0",
        library=LibraryUsed(backend="tensorrt-rtx", version=installed_version("tensorrt-rtx") or "0"),
        targets=["sm89"],
        dtype="bfloat16" if pair.manifest.dtype == "bfloat16" else "float16",  # what engines may say; fp32 runs here
        bundle_sha256=str(bundles.sha256(bundle / bundles.FILE)),
        bundle=pair.manifest,
        engines=engines,
    ).save(target)
    return target


@dataclass
class CpuDevice(Device):
    """Runs the graphs, refuses what an engine's profile does not hold, and counts."""

    captures: bool = True
    torch_device: str = "cpu"
    executed: list[tuple[str, dict[str, tuple[int, ...]]]] = field(default_factory=list)
    """Engine and input shapes of every run that was not a replay."""
    captured: int = 0
    replayed: int = 0
    contexts: int = 0

    def load(self, path: Path) -> Engine:
        return _CpuEngine(self, path)

    def lengths(self) -> list[int]:
        """S of the decoder's runs."""
        return [shapes["inputs_embeds"][1] for name, shapes in self.executed if name == "decoder.engine"]


class _CpuEngine(Engine):
    def __init__(self, device: CpuDevice, path: Path) -> None:
        self.device, self.path = device, path
        # attention as it is; fp32 where the CPU has nothing less, at the graph's boundary too
        self.session = Session(path, SessionOptions(threads=1, fast_attention=False))
        described = EngineManifest.load(path.parent).engines[path.stem]
        self.shapes = [profile.shapes(described.inputs) for profile in described.profiles]
        self.dtypes = {p.name: getattr(torch, p.dtype) for p in (*described.inputs, *described.outputs)}

    def context(self, profile: int) -> Context:
        self.device.contexts += 1
        return _CpuContext(self, profile)


class _CpuContext(Context):
    def __init__(self, engine: _CpuEngine, profile: int) -> None:
        self.engine, self.profile = engine, profile
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: Sequence[int]) -> None:
        assert name in self.engine.session.inputs
        bounds = self.engine.shapes[self.profile].get(name)
        if bounds is not None:
            low, _, high = bounds
            assert all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)), (name, shape, bounds)
        self.shapes[name] = tuple(shape)

    def set_tensor_address(self, name: str, address: int) -> None:
        assert name in self.engine.session.inputs or name in self.engine.session.outputs
        self.addresses[name] = address

    def execute(self) -> None:
        self.engine.device.executed.append((self.engine.path.name, dict(self.shapes)))
        _run(self.engine, self.shapes, self.addresses)

    def capture(self) -> Replay | None:
        device = self.engine.device
        if not device.captures:
            return None
        device.captured += 1
        shapes, addresses = dict(self.shapes), dict(self.addresses)  # fixed from now on

        def replay() -> None:
            device.replayed += 1
            _run(self.engine, shapes, addresses)

        return replay


def _run(engine: _CpuEngine, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
    session = engine.session
    assert shapes.keys() == session.inputs.keys() and addresses.keys() == {*session.inputs, *session.outputs}
    fed = {}
    for name, shape in shapes.items():
        tensor = _at(addresses[name], engine.dtypes[name], shape).clone()
        wants_fp32 = session.inputs[name].type == "tensor(float)"
        fed[name] = (tensor.float() if wants_fp32 else tensor).numpy()
    for name, value in session.run(fed).items():
        output = torch.from_numpy(value.numpy())
        _at(addresses[name], engine.dtypes[name], output.shape).copy_(output)


def _at(address: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    size = math.prod(shape) * dtype.itemsize
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype).view(tuple(shape))
