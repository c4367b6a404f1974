"""What would be built: files, profiles, sizes. Nothing is read of the weights, and no library is needed."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import onnx_ir as ir

from exporters.onnx.graph_file import read_graph
from exporters.onnx.manifest import Manifest, Port
from exporters.tensorrt.errors import EngineError
from exporters.tensorrt.library import BACKENDS, Backend
from exporters.tensorrt.profiles import Limits, Profile, cache_bytes, make_profiles
from exporters.tensorrt.rewrites import rewrite

if TYPE_CHECKING:
    from exporters.fusion.fused_kernels import FusedKernels
    from exporters.fusion.node import KernelNode
    from exporters.kernels.tuned import Tuned

Kernels = Literal["standard", "fused"]
"""What computes the grafts: standard operators, or the project's own kernels as plugins."""
DTYPES = {"fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class GraphPlan:
    """One engine to build."""

    name: str
    graph: Path
    """The bundle's file."""
    model: ir.Model
    """After the rewrites; its weights are pointed to."""
    rewrites: dict[str, int]
    weight_bytes: int
    profiles: list[Profile]
    inputs: list[Port]
    """Those of the bundle's graph that are left after the rewrites."""
    outputs: list[Port]
    plugins: Mapping[str, "KernelNode"] = field(default_factory=dict)
    """Those of the graph's nodes, by operator."""
    fused: Mapping[str, int] = field(default_factory=dict)
    """How many calls of each function became plugins."""
    measured: int = 0
    """How many kinds of launches are cut as they were measured best."""

    @property
    def engine(self) -> str:
        return f"{self.name}.engine"


@dataclass(frozen=True)
class Plan:
    bundle: Path
    manifest: Manifest
    backend: Backend
    graphs: list[GraphPlan]
    cache_bytes: int
    """Key/value caches of the largest batch."""
    memory_bytes: int
    """Visual memory of the largest batch."""
    tuned_on: str | None = None
    """The GPU on which tile configs of fused kernels were measured; None: they follow the rule."""

    @property
    def weight_bytes(self) -> int:
        return sum(graph.weight_bytes for graph in self.graphs)


def make_plan(
    bundle: Path,
    backend: Backend,
    limits: Limits,
    dtype: Literal["fp16", "bf16"] | None = None,
    graphs: tuple[str, ...] = (),
    kernels: Kernels = "standard",
    tuned: "Tuned | None" = None,
) -> Plan:
    """Plan the engines of a bundle; `graphs`: some of its graphs, by default all. `dtype`: what the bundle must be of.
    With "fused" kernels grafts become plugins; `tuned`: how their launches were measured to be best cut.

    Raises BundleError for what is no bundle, or a damaged one or one of a newer version; EngineError for a bundle of
    another dtype, of fp32, for limits that do not fit it, and for fused kernels without Triton.
    """
    if backend not in BACKENDS:
        raise EngineError(f"unknown backend {backend!r}; there are {', '.join(BACKENDS)}")
    if kernels not in get_args(Kernels):
        raise EngineError(f"unknown kernels {kernels!r}; there are {', '.join(get_args(Kernels))}")
    manifest = Manifest.load(bundle)
    _check_dtype(manifest, backend, dtype)
    if unknown := sorted(set(graphs) - manifest.graphs.keys()):
        raise EngineError(f"the bundle has no graph {unknown[0]!r}; it has {', '.join(manifest.graphs)}")
    if kernels == "fused" and not manifest.memory:
        warnings.warn("--kernels fused: the bundle has no grafts, which alone have fused kernels", stacklevel=1)
    profiles = make_profiles(bundle, manifest, limits)
    return Plan(
        bundle=bundle,
        manifest=manifest,
        backend=backend,
        graphs=[
            _graph(bundle, manifest, name, profiles[name], kernels, tuned)
            for name in manifest.graphs
            if not graphs or name in graphs
        ],
        cache_bytes=cache_bytes(manifest, profiles, ("past_",)),
        memory_bytes=cache_bytes(manifest, profiles, ("memory_keys.", "memory_values.")),
        tuned_on=None if tuned is None else tuned.gpu,
    )


def _check_dtype(manifest: Manifest, backend: Backend, dtype: str | None) -> None:
    if manifest.dtype == "float32":
        raise EngineError(
            f"the bundle is of float32, for which {backend} has no attention kernels; export it again with --dtype "
            f"{dtype or 'bf16 or fp16'}"
        )
    if dtype is not None and DTYPES[dtype] != manifest.dtype:
        raise EngineError(
            f"--dtype {dtype}: the bundle is of {manifest.dtype}, and an engine computes in what its graph says; "
            f"export it again with --dtype {dtype}"
        )


def _graph(
    bundle: Path, manifest: Manifest, name: str, profiles: list[Profile], kernels: Kernels, tuned: "Tuned | None"
) -> GraphPlan:
    path = bundle / manifest.graphs[name].file
    model = read_graph(path, manifest.graphs[name])
    measured: set[str] = set()
    fusion = _fusion(profiles, tuned, measured) if kernels == "fused" else None
    replaced = rewrite(model, () if fusion is None else (fusion,))
    tensors = [value.const_value for value in model.graph.initializers.values()]
    size = sum(tensor.length or 0 for tensor in tensors if isinstance(tensor, ir.ExternalTensor))
    names = {value.name for value in model.graph.inputs}
    graph_file = manifest.graphs[name]
    return GraphPlan(
        name=name,
        graph=path,
        model=model,
        rewrites=replaced,
        weight_bytes=size,
        profiles=profiles,
        inputs=[port for port in graph_file.inputs if port.name in names],
        outputs=graph_file.outputs,
        plugins={} if fusion is None else fusion.nodes,
        fused={} if fusion is None else fusion.functions,
        measured=len(measured),
    )


def _fusion(profiles: list[Profile], tuned: "Tuned | None", measured: set[str]) -> "FusedKernels":
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise EngineError(
            f"--kernels fused needs Triton ({error}): pip install 'lvlm-surgeon[kernels]', or take --kernels standard"
        ) from error
    # these are written in Triton, which is not installed everywhere
    from exporters.fusion import NAMESPACE, VERSION
    from exporters.fusion.fused_kernels import FusedKernels
    from exporters.kernels.tuned import chooser
    from exporters.tensorrt.plugins.variants import largest, variant_specs_for

    attributes = {"plugin_version": VERSION, "plugin_namespace": NAMESPACE}
    choose = chooser({} if tuned is None else tuned.tile_configs, measured)
    return FusedKernels(variant_specs_for(profiles), largest(profiles), choose, attributes)
