"""The process in which TensorRT works: it may end the process, take all memory, or print what it likes.

A script, run by its path, that imports the library and the standard library alone. Its stdout is JSON, one event a
line; whatever the libraries print goes to stderr, with this script's log.
"""

import collections
import ctypes
import importlib
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

UNUSED = re.compile(
    r"\b(input|attribute|tensor)\b.*\b(unused|not used|ignored)\b|\b(unused|ignoring)\b.*\b(input|attribute)\b",
    re.IGNORECASE,
)
"""What the library says of an input or attribute that it read and will not use."""
_PAGEOUT = 21
"""MADV_PAGEOUT, since Linux 5.4: pages that are needed again are read again, so it can do no harm to what they hold."""


def main(command: str, argument: str) -> int:
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def emit(event: str, **content: Any) -> None:
        events.write(json.dumps({"event": event, **content}) + "\n")

    if command == "probe":
        emit("probed", **probe(importlib.import_module(argument)))
        return 0
    spec = json.loads(Path(argument).read_text())
    return Build(importlib.import_module(spec["module"]), spec, emit).run()


def probe(trt: Any) -> dict[str, Any]:
    """Version and targets. A library that takes no target builds for the GPU that it finds."""
    takes_targets = hasattr(trt.IBuilderConfig, "set_compute_capability")
    members = trt.ComputeCapability.__members__ if takes_targets else ()
    return {"version": trt.__version__, "targets": [n.lower() for n in members if n.startswith("SM")]}


class Build:
    def __init__(self, trt: Any, spec: dict[str, Any], emit: Any) -> None:
        self.trt, self.spec, self.emit = trt, spec, emit
        self.unused: list[str] = []
        self.layers = ""
        self.weights = MappedWeights(Path(spec["beside"]).parent)
        self.logger = self._logger()

    def run(self) -> int:
        trt, spec = self.trt, self.spec
        flags = 0 if spec.get("plugins") is None else self._register_plugins()
        builder = trt.Builder(self.logger)
        network = builder.create_network(flags)
        parser = trt.OnnxParser(network, self.logger)
        # the graph is the rewritten one; its weights lie where the bundle's own graph finds them, and stay there
        if not parser.parse(Path(spec["graph"]).read_bytes(), spec["beside"]):
            return self._fail("parse", [self._error(parser.get_error(i)) for i in range(parser.num_errors)])
        self._describe(network)
        self._allow_decomposition(network)
        if self.unused:
            return self._fail("unused", self.unused)
        config = builder.create_builder_config()
        self._configure(builder, config)
        with open(spec["output"], "wb") as file:
            built = self._serialize(builder, network, config, file)
        if self.unused:
            return self._fail("unused", self.unused)
        if not built:
            return self._fail("build", [])
        if spec["timing_cache_out"]:
            Path(spec["timing_cache_out"]).write_bytes(bytes(config.get_timing_cache().serialize()))
        Path(spec["layers"]).write_text(self.layers)
        self.emit("built")
        return 0

    def _register_plugins(self) -> int:
        """Register the graph's plugins -> the flags of a network that has them."""
        plugins = self.spec["plugins"]
        sys.path.append(plugins["root"])  # behind everything else: nothing of the tool stands in for another module
        module = importlib.import_module(plugins["module"])
        flags: int = module.register(self.trt, json.loads(Path(plugins["descriptions"]).read_text()))
        return flags

    def _describe(self, network: Any) -> None:
        kinds = collections.Counter(network.get_layer(i).type.name for i in range(network.num_layers))
        special = [
            [layer.type.name, layer.name, layer.metadata]
            for layer in map(network.get_layer, range(network.num_layers))
            if layer.type.name in self.spec["report"]
        ]
        ports = {
            side: {
                tensor.name: [tensor.dtype.name, list(tensor.shape)]
                for tensor in (getattr(network, f"get_{side}")(i) for i in range(getattr(network, f"num_{side}s")))
            }
            for side in ("input", "output")
        }
        self.emit("parsed", kinds=dict(sorted(kinds.items())), special=special, ports=ports)

    def _allow_decomposition(self, network: Any) -> None:
        """Attention without a kernel of its own becomes primitives, and the layer report says which: without this the
        library stops at the first one and names none. Where it has a kernel, it takes it either way."""
        if not hasattr(self.trt, "IAttentionOutputLayer"):
            return
        for layer in map(network.get_layer, range(network.num_layers)):
            if layer.type == self.trt.LayerType.ATTENTION_OUTPUT:
                layer.__class__ = self.trt.IAttentionOutputLayer
                layer.attention.decomposable = True

    def _configure(self, builder: Any, config: Any) -> None:
        trt, spec = self.trt, self.spec
        for shapes in spec["profiles"]:
            profile = builder.create_optimization_profile()
            for name, (smallest, common, largest) in shapes.items():
                profile.set_shape(name, smallest, common, largest)
            config.add_optimization_profile(profile)
        if spec["targets"]:
            config.num_compute_capabilities = len(spec["targets"])
            for i, target in enumerate(spec["targets"]):
                config.set_compute_capability(trt.ComputeCapability.__members__[target.upper()], i)
        # the log then says what the engine's layers consist of, which an engine itself does not tell without a driver
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.progress_monitor = self._monitor()
        if spec["timing_cache_out"]:
            timing_cache = spec["timing_cache_in"]
            config.set_timing_cache(
                config.create_timing_cache(Path(timing_cache).read_bytes() if timing_cache else b""),
                ignore_mismatch=False,
            )

    def _serialize(self, builder: Any, network: Any, config: Any, file: Any) -> bool:
        """Straight into the file where the library can: an engine is as large as its weights."""
        if not hasattr(builder, "build_serialized_network_to_stream"):
            engine = builder.build_serialized_network(network, config)
            if engine is not None:
                file.write(memoryview(engine))
            return engine is not None
        return bool(builder.build_serialized_network_to_stream(network, config, self._writer(file)))

    def _fail(self, stage: str, reasons: list[str]) -> int:
        self.emit("failed", stage=stage, reasons=reasons)
        return 1

    def _error(self, error: Any) -> str:
        where = f"{error.node_operator()} {error.node_name()}".strip()
        return f"{where}: {error.desc()}" if where else str(error.desc())

    # -- what the library calls ----------------------------------------------------------------------------------
    def _logger(self) -> Any:
        trt, build = self.trt, self
        base: Any = trt.ILogger

        class Logger(base):
            def __init__(self) -> None:
                base.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if message.startswith("Layers:"):
                    build.layers = message
                elif severity <= trt.ILogger.INFO:
                    print(f"[{severity.name}] {message}", file=sys.stderr, flush=True)
                if severity <= trt.ILogger.WARNING and UNUSED.search(message):
                    build.unused.append(message)

        return Logger()

    def _monitor(self) -> Any:
        base: Any = self.trt.IProgressMonitor
        emit, unused, weights = self.emit, self.unused, self.weights
        outermost: dict[str, int] = {}

        class Monitor(base):
            def __init__(self) -> None:
                base.__init__(self)

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                if not parent_phase:
                    outermost[phase_name] = num_steps

            def step_complete(self, phase_name: str, step: int) -> bool:
                total = outermost.get(phase_name)
                weights.release()
                try:
                    if total is not None:
                        emit("progress", phase=phase_name, done=min(step + 1, total), total=total)
                except BrokenPipeError:  # nobody waits for this engine any more
                    return False
                return not unused  # a wrong engine need not be finished

            def phase_finish(self, phase_name: str) -> None:
                total = outermost.pop(phase_name, None)
                if total is not None:
                    emit("progress", phase=phase_name, done=total, total=total)

        return Monitor()

    def _writer(self, file: Any) -> Any:
        base: Any = self.trt.IStreamWriter

        class Writer(base):
            def __init__(self) -> None:
                base.__init__(self)

            def write(self, data: bytes) -> int:
                return int(file.write(data))

        return Writer()


class MappedWeights:
    """The files under `folder` that the parser has mapped. A page that was read stays resident, though the library
    works on its own copies: without this the weights are in memory once more, for nothing."""

    def __init__(self, folder: Path, every: float = 1.0) -> None:
        self._inside, self._every, self._next = f"{folder}/", every, time.monotonic() + every
        self._libc = ctypes.CDLL(None)

    def release(self) -> None:
        """Give their pages back, every so many seconds. Where the system knows no such advice, nothing changes."""
        if time.monotonic() < self._next or not os.path.exists("/proc/self/maps"):
            return
        with open("/proc/self/maps") as maps:
            for line in maps:
                span, rights, _, _, _, *name = line.rstrip("\n").split(None, 5)
                if rights == "r--p" and name and name[0].startswith(self._inside):
                    start, end = (int(address, 16) for address in span.split("-"))
                    self._libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _PAGEOUT)
        self._next = time.monotonic() + self._every


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
