"""What a person sees of plans and engines, on stdout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from exporters.tensorrt.build import Built
from exporters.tensorrt.layers import LayerReport, load_report
from exporters.tensorrt.library import installed_version
from exporters.tensorrt.manifest import LAYERS, EngineManifest
from exporters.tensorrt.plan import Plan
from exporters.tensorrt.profiles import Profile
from surgeon.console import print_table

_TITLES = {"Attention": "attention", "TensorScatter": "kv cache update", "RotaryEmbedding": "rotary"}


def report_plan(plan: Plan, target: str) -> None:
    source = plan.manifest.source
    version = installed_version(plan.backend)
    print(f"{plan.bundle}: bundle of {source.name} ({source.model_type}), {plan.manifest.dtype}")
    print(f"for {target} with {plan.backend} {version or '(not installed)'}")
    print()
    rows = [
        (graph.engine, decimal(graph.weight_bytes), profile.name, _sizes(profile))
        for graph in plan.graphs
        for profile in graph.profiles
    ]
    print_table(("engine", "weights", "profile", "sizes"), rows)
    print()
    print(
        f"weights {decimal(plan.weight_bytes)}; at the largest batch {decimal(plan.cache_bytes)} of key/value caches"
        + (f" and {decimal(plan.memory_bytes)} of visual memory" if plan.memory_bytes else "")
    )
    _report_fused({graph.name: graph.fused for graph in plan.graphs})
    _report_measured(plan)
    print("a plan only: nothing was built")


def plan_json(plan: Plan, target: str) -> dict[str, Any]:
    return {
        "dry_run": True,
        "bundle": str(plan.bundle),
        "backend": plan.backend,
        "version": installed_version(plan.backend),
        "target": target,
        "dtype": plan.manifest.dtype,
        "engines": {
            graph.name: {
                "file": graph.engine,
                "fused": dict(graph.fused),
                "measured": graph.measured,
                "weight_bytes": graph.weight_bytes,
                "rewrites": graph.rewrites,
                "profiles": [profile.model_dump() for profile in graph.profiles],
            }
            for graph in plan.graphs
        },
        "weight_bytes": plan.weight_bytes,
        "cache_bytes": plan.cache_bytes,
        "memory_bytes": plan.memory_bytes,
    }


def built_json(built: Built) -> dict[str, Any]:
    return {
        **built.manifest.model_dump(mode="json"),
        "layers": built.report.model_dump(mode="json")["graphs"],
        "fused": built.fused,
        "seconds": built.seconds,
        "peak_memory": built.peak_memory,
    }


def inspect_engines(path: Path | str, show: bool = True) -> EngineManifest:
    """The manifest of a directory of engines, shown where that is asked. Neither library needs to be installed."""
    manifest = EngineManifest.load(path)
    if show:
        layers = Path(path) / LAYERS
        report_engines(path, manifest, load_report(layers) if layers.is_file() else None, None)
    return manifest


def report_engines(path: Path | str, manifest: EngineManifest, report: LayerReport | None, built: Built | None) -> None:
    source, library = manifest.bundle.source, manifest.library
    where = ", ".join(manifest.targets) + (f" ({manifest.gpu})" if manifest.gpu else "")
    print(f"{path}: engines of {source.name} ({source.model_type}), {manifest.dtype}")
    print(f"need     {library.backend} {library.version} and a GPU of {where}")
    print(f"plugins  {', '.join(manifest.plugins) or 'none'}")
    print()
    rows = []
    for name, engine in manifest.engines.items():
        sizes = "; ".join(f"{profile.name}: {_sizes(profile)}" for profile in engine.profiles)
        spent = () if built is None else (_spent(built, name),)
        rows.append((engine.file, decimal(engine.bytes), *spent, sizes))
    columns = ("engine", "size", *(() if built is None else ("built in",)), "profiles")
    print_table(columns, rows)
    if built is not None:
        _report_fused(built.fused)
    if report is not None:
        print()
        print_table(("engine", "kernels", *(f"fused {title}" for title in _TITLES.values())), list(_fused(report)))


def _report_fused(fused: Mapping[str, Mapping[str, int]]) -> None:
    """Which functions fused kernels compute."""
    for name, functions in fused.items():
        for function, count in functions.items():
            print(f"{name}: {count} of {function} {'is' if count == 1 else 'are'} computed by fused kernels")


def _report_measured(plan: Plan) -> None:
    """Whether launches are cut as they were measured best."""
    if count := sum(graph.measured for graph in plan.graphs):
        print(f"{count} kinds of launches are cut as measured on {plan.tuned_on}")
    elif any(graph.fused for graph in plan.graphs):
        print("tile configs are the heuristic's (`surgeon autotune` measures, on the GPU)")


def _fused(report: LayerReport) -> list[tuple[Any, ...]]:
    return [
        (name, graph.kernels, *("{} of {}".format(*graph.count(operator)) for operator in _TITLES))
        for name, graph in report.graphs.items()
    ]


def _spent(built: Built, name: str) -> str:
    if not built.peak_memory[name]:
        return "taken from the cache"
    return f"{built.seconds[name]:.1f} s, {decimal(built.peak_memory[name])} of memory"


def _sizes(profile: Profile) -> str:
    return ", ".join(f"{symbol} {size}" for symbol, size in profile.sizes.items())
