"""One engine, run with torch tensors: sizes checked against its profiles, buffers, calls."""

import weakref
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from exporters.onnx.manifest import Port
from exporters.tensorrt.device import Context, Device, Replay
from exporters.tensorrt.errors import EngineError
from exporters.tensorrt.manifest import EngineFile
from exporters.tensorrt.profiles import Profile, split_dimension

Fed = Mapping[str, "np.ndarray | Tensor"]
"""By name: what the host has, converted to the port's dtype, or what is on the device already."""
_OPTIONS = {"B": "--batch", "S": "--prefill", "T": "--prefill", "M": "--visual-tokens"}


class EngineSession:
    """An engine of a directory, loaded."""

    def __init__(self, path: Path, engine_file: EngineFile, device: Device) -> None:
        """Raises EngineError for a file that the library does not load."""
        self.path, self.engine_file, self.device = path, engine_file, device
        self.inputs = {port.name: port for port in engine_file.inputs}
        self.outputs = {port.name: port for port in engine_file.outputs}
        self.engine = device.load(path)
        self._contexts: dict[int, Context] = {}
        self._idle: dict[int, list[Context]] = {}

    # -- sizes -------------------------------------------------------------------------------------------------
    def size_range(self, symbol: str) -> tuple[int, int]:
        """The smallest and the largest size of a symbol in the profile that goes farthest in it."""
        ranges = [profile.sizes[symbol] for profile in self.engine_file.profiles if symbol in profile.sizes]
        widest = max(ranges, key=lambda bounds: bounds.max)
        return widest.min, widest.max

    def profile_for(self, sizes: Mapping[str, int]) -> int:
        """The first profile that holds all of the sizes. Raises EngineError, with the numbers, where there is none."""
        for number, profile in enumerate(self.engine_file.profiles):
            if not _outside(profile, sizes):
                return number
        nearest = min(self.engine_file.profiles, key=lambda profile: len(_outside(profile, sizes)))
        exceeded = _outside(nearest, sizes)
        requested = ", ".join(f"{symbol} {sizes[symbol]}" for symbol in exceeded)
        supported = ", ".join(f"{symbol} {nearest.sizes[symbol]}" for symbol in exceeded)
        vision = "features" in self.outputs
        options = dict.fromkeys("--image-tokens" if vision else _OPTIONS.get(symbol, "sizes") for symbol in exceeded)
        raise EngineError(
            f"{self.path.name}: the request needs {requested}, the engine was built for {supported}: ask for what "
            f"fits, or build the engines again with another {' and '.join(options)}"
        )

    def sizes(self, fed: Fed) -> dict[str, int]:
        """Of every symbol, by what is fed. Raises EngineError where it contradicts itself or the graph."""
        sizes: dict[str, int] = {}
        for name, port in self.inputs.items():
            shape = fed[name].shape
            if len(shape) != len(port.shape):
                raise EngineError(f"{self.path.name}: {name} has the shape {list(shape)} instead of {port.shape}")
            for size, dimension in zip(shape, port.shape, strict=True):
                factor, symbol = (1, None) if isinstance(dimension, int) else split_dimension(dimension)
                expected = dimension if symbol is None else sizes.setdefault(symbol, size // factor) * factor
                if size != expected:
                    raise EngineError(f"{self.path.name}: {name} has the shape {list(shape)} instead of {port.shape}")
        return sizes

    # -- buffers -----------------------------------------------------------------------------------------------
    def zeros(self, name: str, sizes: Mapping[str, int]) -> Tensor:
        """Zeros on the device, of an input's or output's shape and dtype; `sizes`: of its symbolic dimensions."""
        port = self.inputs.get(name) or self.outputs[name]
        return torch.zeros(_shape(port, sizes), dtype=_dtype(port), device=self.device.torch_device)

    def on_device(self, name: str, value: "np.ndarray | Tensor") -> Tensor:
        """A tensor that can be bound. One that is on the device is taken as it is."""
        port = self.inputs[name]
        if isinstance(value, Tensor):
            assert value.dtype == _dtype(port) and value.is_contiguous()
            return value
        return _from_host(value).to(self.device.torch_device, _dtype(port))

    # -- running -----------------------------------------------------------------------------------------------
    def run(self, fed: Fed, outputs: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Run once. `outputs`: tensors to write outputs to; the others are allocated. -> all outputs."""
        fed = {name: fed[name] for name in self.inputs}
        sizes = self.sizes(fed)
        number = self.profile_for(sizes)
        if number not in self._contexts:
            self._contexts[number] = self.engine.context(number)
        tensors = {name: self.on_device(name, value) for name, value in fed.items()}
        places = {name: (outputs or {}).get(name) for name in self.outputs}
        results = {name: self.zeros(name, sizes) if place is None else place for name, place in places.items()}
        _bind(self._contexts[number], tensors, results)
        self._contexts[number].execute()
        return results

    def repeated(self, fed: Fed, outputs: Mapping[str, Tensor]) -> "RepeatedCall":
        """A call to be made many times, of the same sizes and into the same buffers."""
        fed = {name: fed[name] for name in self.inputs}
        sizes = self.sizes(fed)
        number = self.profile_for(sizes)
        # what is captured uses its context's working memory, so each has a context of its own, and hands it on
        idle = self._idle.setdefault(number, [])
        context = idle.pop() if idle else self.engine.context(number)
        tensors = {name: self.on_device(name, value) for name, value in fed.items()}
        rest = {name: self.zeros(name, sizes) for name in self.outputs if name not in outputs}
        call = RepeatedCall(context, tensors, {**outputs, **rest})
        weakref.finalize(call, idle.append, context).atexit = False
        return call


class RepeatedCall:
    """An engine with everything bound, which is captured as soon as the library lets it be."""

    def __init__(self, context: Context, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        self.context, self.inputs, self.outputs = context, inputs, outputs
        _bind(context, inputs, outputs)
        self._executed = False
        self._replay: Replay | None = None

    def __call__(self, changed: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        """Run with new contents of some inputs -> the outputs, which the next call overwrites."""
        for name, value in changed.items():
            if name in self.inputs:
                self.inputs[name].copy_(_from_host(value))
        if self._replay is None and self._executed:
            self._replay = self.context.capture()
        if self._replay is None:
            self.context.execute()
        else:
            self._replay()
        self._executed = True
        return self.outputs


def _from_host(value: np.ndarray) -> Tensor:
    """A copy, laid out as it is read: an array that was broadcast is not."""
    return torch.from_numpy(np.array(value, order="C"))


def _bind(context: Context, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
    for name, tensor in inputs.items():
        context.set_input_shape(name, tuple(tensor.shape))
    for name, tensor in (*inputs.items(), *outputs.items()):
        assert tensor.is_contiguous()
        context.set_tensor_address(name, tensor.data_ptr())


def _outside(profile: Profile, sizes: Mapping[str, int]) -> list[str]:
    """The symbols whose size the profile does not hold."""
    return [symbol for symbol, bounds in profile.sizes.items() if not bounds.min <= sizes[symbol] <= bounds.max]


def _shape(port: Port, sizes: Mapping[str, int]) -> list[int]:
    shape = []
    for dimension in port.shape:
        factor, symbol = (dimension, None) if isinstance(dimension, int) else split_dimension(dimension)
        shape.append(factor if symbol is None else factor * sizes[symbol])
    return shape


def _dtype(port: Port) -> torch.dtype:
    dtype = getattr(torch, port.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype
