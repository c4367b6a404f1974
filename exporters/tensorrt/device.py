"""The device boundary: all that running an engine asks of a GPU and of the library, and it with TensorRT on CUDA."""

import importlib
import mmap
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from exporters.tensorrt.errors import EngineError
from exporters.tensorrt.library import Backend, module_of
from exporters.tensorrt.plugins import rtx

Replay = Callable[[], None]


class Context(ABC):
    """One profile of an engine with working memory of its own. Every tensor is bound before it is executed."""

    @abstractmethod
    def set_input_shape(self, name: str, shape: Sequence[int]) -> None: ...

    @abstractmethod
    def set_tensor_address(self, name: str, address: int) -> None:
        """Of an input or output: contiguous memory on the device, of its dtype and shape."""

    @abstractmethod
    def execute(self) -> None:
        """Run, after everything that torch has queued, and wait for the end."""

    @abstractmethod
    def capture(self) -> Replay | None:
        """What `execute` does with the shapes and addresses of now, recorded, which it has done once already; None
        where that cannot be, or not yet."""


class Engine(ABC):
    """A loaded engine."""

    @abstractmethod
    def context(self, profile: int) -> Context: ...


class Device(ABC):
    """Where engines run."""

    torch_device: str
    """Where torch allocates what is bound."""

    def register(self, plugins: Sequence[str]) -> None:
        """Make known what engines that are loaded later need, as their manifest names it; here nothing."""

    @abstractmethod
    def load(self, path: Path) -> Engine:
        """Raises EngineError for a file that is no engine of this library and GPU."""


class CudaDevice(Device):
    """The current CUDA device, through TensorRT or TensorRT for RTX."""

    torch_device = "cuda"

    def __init__(self, backend: Backend) -> None:
        """Loads the library into this process. Raises EngineError where torch has no CUDA or the library is broken."""
        if not torch.cuda.is_available():
            raise EngineError(
                f"torch {torch.__version__} finds no CUDA device, and holds what engines read and write: install a "
                "CUDA build of torch (see `surgeon doctor`)"
            )
        try:
            self.trt: Any = importlib.import_module(module_of(backend))
        except (ImportError, OSError) as error:
            raise EngineError(f"{backend} cannot be loaded: {error}; see `surgeon doctor`") from error
        self.logger = _logger(self.trt)
        self.runtime = self.trt.Runtime(self.logger)
        self.stream = torch.cuda.Stream()

    def register(self, plugins: Sequence[str]) -> None:
        rtx.register_runtime(self.trt, [name.rpartition("::")[2] for name in plugins])

    def load(self, path: Path) -> Engine:
        self.logger.errors.clear()
        # mapped: an engine is as large as its weights, which go to the GPU
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            engine = self.runtime.deserialize_cuda_engine(mapped)
        if engine is None:
            raise EngineError(f"{path} cannot be loaded: {self.logger.last()}; build the engines again where they run")
        return _CudaEngine(self, engine)


class _CudaEngine(Engine):
    def __init__(self, device: CudaDevice, engine: Any) -> None:
        self.device, self.engine = device, engine
        self.config: Any = None
        strategy = device.trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        if hasattr(device.trt, "IRuntimeCache"):  # RTX compiles kernels for the GPU it meets: once for all contexts
            self.config = engine.create_runtime_config()
            self.config.set_execution_context_allocation_strategy(strategy)
            self.config.set_runtime_cache(self.config.create_runtime_cache())
        self.how = strategy if self.config is None else self.config

    def context(self, profile: int) -> Context:
        context = self.engine.create_execution_context(self.how)
        stream = self.device.stream
        if context is None or not context.set_optimization_profile_async(profile, stream.cuda_stream):
            raise EngineError(f"no execution context can be made for profile {profile}: {self.device.logger.last()}")
        stream.synchronize()
        return _CudaContext(self.device, context)


class _CudaContext(Context):
    def __init__(self, device: CudaDevice, context: Any) -> None:
        self.device, self.context = device, context
        self.capturable = True

    def set_input_shape(self, name: str, shape: Sequence[int]) -> None:
        self._check(self.context.set_input_shape(name, tuple(shape)), f"the shape {list(shape)} of {name}")

    def set_tensor_address(self, name: str, address: int) -> None:
        self._check(self.context.set_tensor_address(name, address), f"the address of {name}")

    def execute(self) -> None:
        stream = self.device.stream
        stream.wait_stream(torch.cuda.current_stream())
        self._check(self.context.execute_async_v3(stream.cuda_stream), "its inputs, and did not run")
        stream.synchronize()

    def capture(self) -> Replay | None:
        stream = self.device.stream
        ready = getattr(self.context, "is_stream_capturable", None)
        if not self.capturable or (ready is not None and not ready(stream.cuda_stream)):
            return None
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                self._check(self.context.execute_async_v3(stream.cuda_stream), "being captured")
        except (EngineError, RuntimeError):  # torch's, where the capture broke: the engine runs as it did
            self.capturable = False
            return None

        def replay() -> None:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                graph.replay()
            stream.synchronize()

        return replay

    def _check(self, worked: bool, subject: str) -> None:
        if not worked:
            raise EngineError(f"the engine does not take {subject}: {self.device.logger.last()}")


def _logger(trt: Any) -> Any:
    base: Any = trt.ILogger

    class Logger(base):
        def __init__(self) -> None:
            base.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(" ".join(message.split())[:300])

        def last(self) -> str:
            return self.errors[-1] if self.errors else "the library gave no reason"

    return Logger()
