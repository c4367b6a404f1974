"""One engine after another, each built by the library in a child process, or taken from the cache."""

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from exporters.child_process import log_errors, run_child
from exporters.onnx.manifest import Port
from exporters.tensorrt import layers
from exporters.tensorrt.cache import BuildCache, graph_digest, weights_digest
from exporters.tensorrt.dtypes import NAMES
from exporters.tensorrt.errors import BuildError, EngineError
from exporters.tensorrt.layers import GraphLayers
from exporters.tensorrt.library import CHILD, Backend, Library, gpu, link_libraries
from exporters.tensorrt.manifest import digest
from exporters.tensorrt.plan import GraphPlan, Kernels, Plan
from exporters.tensorrt.profiles import Limits
from surgeon.checkpoint import staged_file
from surgeon.progress import Progress

_SHOWN = 3
_ROOT = Path(__file__).parents[2]
_PLUGINS = {
    "tensorrt": "exporters.tensorrt.plugins.enterprise",
    "tensorrt-rtx": "exporters.tensorrt.plugins.rtx",
}
"""What makes plugins known to each library, in the child."""


@dataclass(frozen=True)
class Options:
    """How engines are built."""

    backend: Backend = "tensorrt-rtx"
    target: str = "native"
    """Compute capabilities, such as "sm80,sm89", or "native"."""
    dtype: Literal["fp16", "bf16"] | None = None
    """What the bundle must be of."""
    limits: Limits = Limits()  # noqa: RUF009 (it is frozen)
    timing_cache: Path | None = None
    """Read where it is there, written with what was timed."""
    cache: Path | None = None
    """A folder where engines are kept for the next build of the same."""
    strict: bool = False
    """Attention that is not fused is an error."""
    graphs: tuple[str, ...] = ()
    """Some of the bundle's graphs; all where it is empty."""
    kernels: Kernels = "standard"
    tile_configs: Path | None = None
    """A file of `exporters.kernels.tuned`: how launches of fused kernels are cut; by default that of the GPU that is
    here, for a native target, where it was measured."""


@dataclass(frozen=True)
class BuiltEngine:
    layers: GraphLayers
    seconds: float
    peak_memory: int


def serialized(model: ir.Model) -> bytes:
    data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return data


class Builder:
    """Builds one graph after the other in a folder of its own."""

    def __init__(
        self,
        plan: Plan,
        library: Library,
        targets: tuple[str, ...],
        options: Options,
        cache: BuildCache | None,
        work: Path,
        progress: Progress | None,
    ) -> None:
        self.plan, self.library, self.targets, self.options = plan, library, targets, options
        self.cache, self.work, self.progress = cache, work, progress
        self.links = link_libraries(library.backend, work / "lib")
        self.timings = work / "timings"
        if options.timing_cache is not None and options.timing_cache.is_file():
            shutil.copyfile(options.timing_cache, self.timings)

    def build(self, graph: GraphPlan, engine: Path) -> BuiltEngine:
        start = time.perf_counter()
        spec = self._spec(graph, engine, self._compile(graph))
        key = None if self.cache is None else BuildCache.key(self._inputs_of(graph, spec))
        if self.cache is not None and key is not None:
            layers = self.cache.take(key, engine, lambda entry: GraphLayers.model_validate(entry["layers"]))
            if layers is not None:
                return BuiltEngine(layers, 0.0, 0)
        built = self._run(graph, spec, start)
        if self.cache is not None and key is not None:
            self.cache.put(key, engine, {"layers": built.layers.model_dump()})
        return built

    def keep_timings(self) -> None:
        if self.options.timing_cache is not None and self.timings.is_file():
            with staged_file(self.options.timing_cache, overwrite=True) as file:
                shutil.copyfile(self.timings, file)

    def _compile(self, graph: GraphPlan) -> dict[str, Any]:
        """The descriptions of the graph's plugins, with their kernels for every target."""
        if not graph.plugins:
            return {}
        # needs Triton, which a graph without plugins does not
        from exporters.fusion.node import compile_nodes
        from exporters.kernels.folder import compiled
        from exporters.tensorrt.plugins.variants import capabilities

        here = gpu()
        targets = self.targets or (() if here is None else (here.capability,))
        if self.library.backend == "tensorrt" and len(targets) > 1:
            raise EngineError(
                f"--kernels fused: tensorrt keeps one kernel of a plugin in an engine, and {', '.join(targets)} need "
                "one each: name one target, or take --backend tensorrt-rtx"
            )
        if self.progress is not None:
            self.progress(f"{graph.name}: compiling kernels", 0, 1)
        return compile_nodes(graph.plugins, capabilities(targets), compiled())

    def _spec(self, graph: GraphPlan, engine: Path, plugins: Mapping[str, Any]) -> dict[str, Any]:
        """The child's job, JSON."""
        plugins_file = self.work / f"{graph.name}.plugins"
        plugins_file.write_text(json.dumps(plugins, sort_keys=True))
        timed = self.options.timing_cache is not None
        return {
            "module": self.library.module,
            "graph": str(self.work / f"{graph.name}.onnx"),
            "beside": str(graph.graph.resolve()),
            "output": str(engine),
            "layers": str(self.work / f"{graph.name}.layers"),
            "report": layers.REPORTED,
            "targets": list(self.targets),
            "plugins": {"root": str(_ROOT), "module": _PLUGINS[self.library.backend], "descriptions": str(plugins_file)}
            if plugins
            else None,
            "profiles": [profile.shapes(graph.inputs) for profile in graph.profiles],
            "timing_cache_in": str(self.timings) if timed and self.timings.is_file() else None,
            "timing_cache_out": str(self.timings) if timed else None,
        }

    def _inputs_of(self, graph: GraphPlan, spec: Mapping[str, Any]) -> dict[str, Any]:
        here = None if self.targets else gpu()
        return {
            "graph": graph_digest(serialized(graph.model)),
            "weights": weights_digest(graph.model, self.plan.bundle),
            "library": [self.library.backend, self.library.version],
            "targets": list(self.targets) or [None if here is None else [here.name, here.capability]],
            "profiles": spec["profiles"],
            "plugins": None if spec["plugins"] is None else digest(Path(spec["plugins"]["descriptions"])),
        }

    def _run(self, graph: GraphPlan, spec: Mapping[str, Any], start: float) -> BuiltEngine:
        Path(spec["graph"]).write_bytes(serialized(graph.model))
        spec_file = self.work / f"{graph.name}.json"
        spec_file.write_text(json.dumps(spec))
        log = self.work / f"{graph.name}.log"

        def heard(event: dict[str, Any]) -> None:
            if self.progress is not None and event["event"] == "progress":
                self.progress(f"{graph.name}: {event['phase'].lower()}", event["done"], event["total"])

        task = f"{self.library.backend} building {graph.engine}"
        outcome = run_child(["build", str(spec_file)], task, log, CHILD, self.links, heard)
        seconds = time.perf_counter() - start
        if failed := outcome.last("failed"):
            raise BuildError(_failure(graph.name, self.library, failed, log))
        parsed = outcome.last("parsed")
        assert parsed is not None
        self._check_ports(graph, parsed["ports"])
        graph_layers = layers.report(graph.model, parsed, Path(spec["layers"]).read_text())
        return BuiltEngine(graph_layers, seconds, outcome.peak_memory)

    def _check_ports(self, graph: GraphPlan, ports: Mapping[str, Mapping[str, Any]]) -> None:
        """An engine with other inputs and outputs than the manifest says would fail only where it runs."""
        sides: tuple[tuple[str, list[Port]], ...] = (("input", graph.inputs), ("output", graph.outputs))
        for side, expected in sides:
            dtypes = {name: NAMES.get(dtype, dtype) for name, (dtype, _) in ports[side].items()}
            if dtypes != {port.name: port.dtype for port in expected}:
                first_wrong = next(p for p in expected if dtypes.get(p.name) != p.dtype)
                raise BuildError(
                    f"{graph.name}: {self.library.backend} turned {side} {first_wrong.name} ({first_wrong.dtype}) into "
                    f"{dtypes.get(first_wrong.name, 'nothing')}: the bundle and this version of the library do not fit"
                )


def _failure(name: str, library: Library, failed: Mapping[str, Any], log: Path) -> str:
    """The child's reason in one line."""
    reasons = list(dict.fromkeys(" ".join(str(reason).split()) for reason in failed["reasons"]))
    text = " | ".join(reason[:300] for reason in reasons[:_SHOWN]) or log_errors(log)
    library_name = f"{library.backend} {library.version}"
    match failed["stage"]:
        case "parse":
            return f"{name}: {library_name} does not take the graph: {text}"
        case "unused":
            return f"{name}: {library_name} would leave out part of the graph, so its engine would be wrong: {text}"
    return f"{name}: {library_name} built no engine: {text}"
