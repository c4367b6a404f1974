"""Engines of a bundle, planned, built and published together."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exporters.fusion import NAMESPACE
from exporters.onnx import manifest as bundles
from exporters.onnx.manifest import PROCESSOR
from exporters.tensorrt.builder import Builder, Options, serialized
from exporters.tensorrt.cache import BuildCache, graph_digest
from exporters.tensorrt.errors import EngineError, LayerError
from exporters.tensorrt.layers import LayerReport
from exporters.tensorrt.library import NATIVE, Library, choose_targets, find, gpu, installed_version
from exporters.tensorrt.manifest import LAYERS, EngineFile, EngineManifest, LibraryUsed, digest
from exporters.tensorrt.plan import GraphPlan, Plan, make_plan
from surgeon.checkpoint import SourceFiles, check_link, check_target, share_file, staged
from surgeon.cleanup import temporary_directory
from surgeon.errors import SurgeonError
from surgeon.progress import Progress
from surgeon.version import __version__

if TYPE_CHECKING:
    from exporters.kernels.tuned import Tuned

__all__ = ["Built", "Options", "build_engines", "plan_engines"]


@dataclass(frozen=True)
class Built:
    manifest: EngineManifest
    report: LayerReport
    seconds: dict[str, float]
    peak_memory: dict[str, int]
    """Bytes that the child process held at most, by graph; 0 for an engine out of the cache."""
    fused: dict[str, dict[str, int]]
    """By graph, how many calls of each graft's function became plugins."""


def build_engines(
    bundle: Path, target: Path, options: Options, *, overwrite: bool = False, progress: Progress | None = None
) -> Built:
    """Build the engines of a bundle into a new directory `target`, which appears whole or not at all.

    Weights are read by the library alone, in a child process. Raises EngineError for what cannot be built here or from
    this bundle, BuildError where the library fails, ProcessError where its process ends, LayerError for unfused
    attention with `strict`, BundleError for the bundle, CheckpointError where it changes meanwhile, TargetError for the
    target.
    """
    plan = _plan(bundle, options)
    check_target(target, overwrite, protect=[bundle])
    library = find(options.backend)
    targets = choose_targets(library, options.target)
    if options.timing_cache is not None and not library.keeps_timings:
        raise EngineError(f"--timing-cache: {library.backend} times nothing when it builds; leave it out")
    cache = None if options.cache is None else BuildCache(options.cache)
    files = SourceFiles.of([path for path in bundle.rglob("*") if path.is_file()])

    def verify(directory: Path) -> None:
        files.check()
        EngineManifest.load(directory, verify=False)  # their digests were just computed from these very files

    with staged(target, overwrite, [bundle], verify=verify) as directory:
        with temporary_directory(".work-", directory) as work:
            builder = Builder(plan, library, targets, options, cache, work, progress)
            try:
                engines = {graph.name: builder.build(graph, directory / graph.engine) for graph in plan.graphs}
            except SurgeonError:
                files.check()  # a library that reads weights that are cut short crashes, and cannot say why
                raise
            builder.keep_timings()
        layer_report = LayerReport(graphs={name: engine.layers for name, engine in engines.items()})
        if options.strict and (warnings := layer_report.warnings()):
            raise LayerError(f"{'; '.join(warnings)} (--strict)")
        (directory / LAYERS).write_text(layer_report.model_dump_json(indent=2) + "\n")
        (directory / PROCESSOR).mkdir()
        for path in (bundle / PROCESSOR).iterdir():
            check_link(path, bundle)
            share_file(path, directory / PROCESSOR / path.name, "copy")
        manifest = _manifest(plan, library, targets, directory)
        manifest.save(directory)
    return Built(
        manifest,
        layer_report,
        {name: engine.seconds for name, engine in engines.items()},
        {name: engine.peak_memory for name, engine in engines.items()},
        {graph.name: dict(graph.fused) for graph in plan.graphs if graph.fused},
    )


def plan_engines(bundle: Path, options: Options, target: Path | None = None, overwrite: bool = False) -> Plan:
    """What `build_engines` would build, and its refusals, without a library as far as that goes: only where it is
    installed are the names of targets checked. A plan for the GPU that is here needs none."""
    plan = _plan(bundle, options)
    if target is not None:
        check_target(target, overwrite, protect=[bundle])
    if options.target != NATIVE and installed_version(options.backend) is not None:
        choose_targets(find(options.backend), options.target)
    return plan


def _plan(bundle: Path, options: Options) -> Plan:
    tuned = _tuned(options)
    plan = make_plan(bundle, options.backend, options.limits, options.dtype, options.graphs, options.kernels, tuned)
    if options.tile_configs is not None and not any(graph.measured for graph in plan.graphs):
        warnings.warn(
            f"--tile-configs {options.tile_configs}: none of what was measured on {plan.tuned_on} is of this bundle's "
            "sizes and batches; tile configs follow the rule",
            stacklevel=1,
        )
    return plan


def _tuned(options: Options) -> "Tuned | None":
    """Tile configs as measured, from the file that was named or that of the GPU that is here."""
    if options.kernels == "standard":
        if options.tile_configs is not None:
            raise EngineError("--tile-configs applies to fused kernels only: add --kernels fused, or leave it out")
        return None
    # needs torch alone, but what fused kernels need is imported for them alone
    from exporters.kernels.tuned import Tuned, load, read

    if options.tile_configs is None:
        here = gpu() if options.target == NATIVE else None
        tile_configs = {} if here is None else read(here.name)
        return Tuned(here.name, tile_configs) if here is not None and tile_configs else None
    try:
        return load(options.tile_configs)
    except (OSError, ValueError) as error:
        raise EngineError(
            f"--tile-configs {options.tile_configs}: {error}; measure on the GPU with `surgeon autotune`"
        ) from error


def _manifest(plan: Plan, library: Library, targets: tuple[str, ...], directory: Path) -> EngineManifest:
    here = None if targets else gpu()
    return EngineManifest(
        tool_version=__version__,
        library=LibraryUsed(backend=library.backend, version=library.version),
        targets=list(targets) or ([] if here is None else [here.capability]),
        gpu=None if here is None else here.name,
        dtype=plan.manifest.dtype,  # type: ignore[arg-type]  # fp32 was refused
        bundle_sha256=str(bundles.sha256(plan.bundle / bundles.FILE)),
        bundle=plan.manifest,
        engines={graph.name: _engine(graph, directory / graph.engine) for graph in plan.graphs},
        plugins=_plugins(plan),
    )


def _plugins(plan: Plan) -> list[str]:
    """Those that must be there when the engines are loaded: TensorRT keeps all of a plugin that was compiled ahead of
    time in the engine, TensorRT for RTX asks for whoever launches it."""
    if plan.backend == "tensorrt":
        return []
    return sorted({f"{NAMESPACE}::{name}" for graph in plan.graphs for name in graph.plugins})


def _engine(graph: GraphPlan, path: Path) -> EngineFile:
    return EngineFile(
        file=path.name,
        bytes=path.stat().st_size,
        sha256=digest(path),
        graph_sha256=graph_digest(serialized(graph.model)),
        rewrites=graph.rewrites,
        profiles=graph.profiles,
        inputs=graph.inputs,
        outputs=graph.outputs,
    )
