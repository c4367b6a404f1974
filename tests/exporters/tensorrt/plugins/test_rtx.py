"""Real engines of TensorRT for RTX with the grafts' kernels as plugins, built without a GPU."""

import contextlib
import json
import types
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import Case
from exporters.fusion import FORMAT
from exporters.tensorrt.build import Built, Options, build_engines, plan_engines
from exporters.tensorrt.errors import EngineError
from exporters.tensorrt.manifest import EngineManifest
from exporters.tensorrt.plugins import rtx
from exporters.tensorrt.plugins.launch import Driver
from exporters.tensorrt.profiles import Limits, Range
from exporters.tensorrt.runtime import check_runnable
from pairs import Pair

TARGETS = "sm80,sm89,sm120"
PVM = ("pvm:layers=1,2,latent=64",)
MIXIN = ("mixin:layers=0,2,num_heads=2,intermediate=48,rope_theta=5000",)
ONE_OF_EACH = ("mixin:layers=0,num_heads=2,intermediate=48,rope_theta=5000", "pvm:layers=2,latent=64")
CASES = [
    Case("qwen3_vl", PVM, "float16", "causal"),
    Case("qwen3_vl", ONE_OF_EACH, "bfloat16", "causal"),
    Case("internvl", MIXIN, "float16", "causal"),
    Case("internvl", ONE_OF_EACH, "bfloat16", "all"),
]
FUNCTIONS = {"pvm": "PersistentVisualMemory", "mixin": "Mixin"}
STEPS = {
    "pvm": ["pvm_attend", "pvm_down", "pvm_inject", "pvm_retrieve", "pvm_swiglu", "pvm_text"],
    "mixin": ["mixin_attend", "mixin_down", "mixin_query", "mixin_retrieve", "mixin_swiglu"],
}


def options(**more: Any) -> Options:
    limits = Limits(batch=Range.of(1, 2), prefill=Range.of(1, 16))
    return Options(**{"target": TARGETS, "limits": limits, "graphs": ("decoder",), "kernels": "fused"} | more)


def bundle_of(export: Callable[..., Pair], case: Case) -> Path:
    dtype = getattr(torch, case.dtype)
    return export(case.model_type, case.recipe, dtype, visibility=case.visibility, head_dim=32).bundle


@pytest.fixture(scope="module")
def cache(shared: Callable[..., Path]) -> Path:
    """A cache of engines."""
    return shared("cache of engines with plugins", lambda folder: None)


@pytest.fixture(scope="module")
def engine(
    export: Callable[..., Pair], built_once: Callable[..., tuple[Path, Built]], cache: Path
) -> Callable[..., tuple[Path, Built]]:
    def get(case: Case = CASES[0]) -> tuple[Path, Built]:
        target = TARGETS if case is CASES[0] else "sm89"
        return built_once(f"with plugins, {case}", bundle_of(export, case), options(cache=cache, target=target))

    return get


def carried(engine: bytes) -> list[dict[str, Any]]:
    """The descriptions that an engine holds."""
    descriptions, place = [], engine.find(b"\x78\xda")
    while place >= 0:
        with contextlib.suppress(zlib.error, ValueError):  # two bytes that look like the start of one
            descriptions.append(json.loads(zlib.decompressobj().decompress(engine[place:])))
        place = engine.find(b"\x78\xda", place + 2)
    return descriptions


@pytest.mark.parametrize(
    "case", [CASES[0], *(pytest.param(case, marks=pytest.mark.long) for case in CASES[1:])], ids=str
)
def test_an_engine_has_a_plugin_for_every_launch(case: Case, engine: Callable[..., tuple[Path, Built]]) -> None:
    path, built = engine(case)
    kinds = [entry.kind for entry in built.manifest.bundle.memory]
    assert len(kinds) == 2
    assert built.fused == {"decoder": {FUNCTIONS[kind]: kinds.count(kind) for kind in kinds}}
    assert built.report.graphs["decoder"].network["PLUGIN_V3"] == sum(len(STEPS[kind]) for kind in kinds)
    plugins = sorted(f"surgeon::{step}" for kind in set(kinds) for step in STEPS[kind])
    assert built.manifest.plugins == EngineManifest.load(path).plugins == plugins
    assert built.manifest.engines["decoder"].rewrites["FusedKernels"] == 2
    # the backbone's attention is left to the library
    assert built.report.graphs["decoder"].count("Attention") == (3, 3)


def test_an_engine_carries_its_kernels_for_every_target(engine: Callable[..., tuple[Path, Built]]) -> None:
    path, _ = engine()
    descriptions = carried((path / "decoder.engine").read_bytes())
    assert {each["kernel"] for each in descriptions} == {"linear", "attend", "retrieve", "swiglu", "inject"}
    for each in descriptions:
        for variant in each["variants"]:
            assert [kernel["capability"] for kernel in variant["kernels"]] == [80, 89, 120]
            assert all(f".entry {kernel['entry']}(" in kernel["ptx"] for kernel in variant["kernels"])


def test_the_build_cache_knows_the_kernels(
    export: Callable[..., Pair], engine: Callable[..., tuple[Path, Built]], cache: Path, tmp_path: Path
) -> None:
    engine()  # another test may have built it in another process
    bundle = bundle_of(export, CASES[0])
    again = build_engines(bundle, tmp_path / "again", options(cache=cache))
    assert again.seconds == {"decoder": 0.0} and again.manifest.plugins == [f"surgeon::{step}" for step in STEPS["pvm"]]
    standard = build_engines(bundle, tmp_path / "standard", options(cache=cache, kernels="standard"))
    assert standard.seconds["decoder"] > 0 and standard.manifest.plugins == [] and standard.fused == {}
    assert standard.report.graphs["decoder"].network.get("PLUGIN_V3") is None


def test_a_head_that_no_kernel_takes_is_left_as_it_is_and_told_once(export: Callable[..., Pair]) -> None:
    bundle = export("qwen3_vl", ("pvm:layers=1,2,latent=32",), torch.float16).bundle
    with pytest.warns(UserWarning, match="head_dim 16, which is no power of two from 32 to 256; standard") as warned:
        plan = plan_engines(bundle, options())
    assert len(warned) == 1
    (graph,) = plan.graphs
    assert graph.rewrites["FusedKernels"] == 0 and graph.rewrites["InlineFunctions"] == 2 and not graph.plugins


def test_a_gpu_without_kernels_is_refused(export: Callable[..., Pair], tmp_path: Path) -> None:
    bundle = bundle_of(export, CASES[0])
    with pytest.raises(EngineError, match="need compute capability 8.0, and sm75 is older"):
        build_engines(bundle, tmp_path / "out", options(target="sm75"))
    assert not list(tmp_path.iterdir())


def test_engines_that_need_plugins_of_others_are_refused(engine: Callable[..., tuple[Path, Built]]) -> None:
    path, built = engine()
    with pytest.raises(EngineError, match="needs the plugins other::thing, which this version has not"):
        check_runnable(path, built.manifest.model_copy(update={"plugins": ["surgeon::pvm_text", "other::thing"]}))
    with pytest.raises(EngineError, match="nothing was run"):
        check_runnable(path, built.manifest.model_copy(update={"targets": ["sm10"]}))


# -- what runs an engine, with a stand-in for the library ---------------------------------------------------------
class Registry:
    def __init__(self) -> None:
        self.all_creators: list[Any] = []

    def register_creator(self, creator: Any, namespace: str) -> None:
        assert namespace == creator.plugin_namespace == "surgeon"
        self.all_creators.append(creator)


@pytest.fixture
def library() -> Iterator[Any]:
    names = ("IPluginV3", "IPluginV3OneCore", "IPluginV3OneBuild", "IPluginV3OneRuntime", "IPluginCreatorV3One")
    registry = Registry()
    yield types.SimpleNamespace(
        **{name: type(name, (), {"__init__": lambda self: None}) for name in names},
        get_plugin_registry=lambda: registry,
        PluginFieldCollection=list,
        PluginField=lambda name, data, kind: types.SimpleNamespace(name=name, data=data),
        PluginFieldType=types.SimpleNamespace(UNKNOWN=0),
        DataType=types.SimpleNamespace(FLOAT="FLOAT", HALF="HALF", BF16="BF16", INT32="INT32", BOOL="BOOL"),
    )
    rtx._registered.clear()


def test_a_loaded_plugin_is_what_its_engine_says(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    described = {
        "format": FORMAT,
        "kernel": "linear",
        "inputs": ["float16", "float16"],
        "outputs": [{"dtype": "float32", "shape": [["dim", 0, 0], 64]}],
        "sizes": [["dim", 0, 0]],
        "variants": [{"tokens": None, "grid": [1, ["dim", 0, 0], 1], "kernels": []}],
    }
    for _ in range(2):  # a process that loads several engines
        rtx.register_runtime(library, ["pvm_text", "pvm_down"])
    assert [each.name for each in library.get_plugin_registry().all_creators] == ["pvm_text", "pvm_down"]
    creator = library.get_plugin_registry().all_creators[0]
    field = library.PluginField("described", zlib.compress(json.dumps(described).encode()), 0)
    plugin = creator.create_plugin("layer", [field], "RUNTIME").clone().attach_to_context(None)
    assert (plugin.plugin_name, plugin.plugin_version, plugin.num_outputs) == ("pvm_text", "1", 1)
    assert plugin.get_output_data_types(["HALF", "HALF"]) == ["FLOAT"]
    with pytest.raises(ValueError, match="pvm_text is of another version of surgeon: build the engine again"):
        older = json.dumps(described | {"format": FORMAT - 1})
        creator.create_plugin("layer", [library.PluginField("described", zlib.compress(older.encode()), 0)], "RUNTIME")
    (again,) = plugin.get_fields_to_serialize()
    assert json.loads(zlib.decompress(again.data)) == described

    ran = []
    monkeypatch.setattr(rtx.Driver, "run", lambda driver, *arguments: ran.append(arguments))
    shapes = [types.SimpleNamespace(dims=(3, 32)), types.SimpleNamespace(dims=(64, 32))]
    assert plugin.enqueue(shapes, [types.SimpleNamespace(dims=(3, 64))], [1, 2], [3], 0, 77) == 0
    assert ran == [(described, [(3, 32), (64, 32)], [1, 2], [3], 77)]


def test_kernels_read_and_write_tensors_in_plain_order_alone() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    described = {"inputs": ["float16", "bool"], "outputs": [{"dtype": "float16", "shape": [["dim", 0, 0]]}]}
    plugin = rtx._plugin_class(trt, Driver())("pvm_text", described)
    half, linear = trt.DataType.HALF, trt.TensorFormat.LINEAR

    def taken(position: int, dtype: Any, form: Any) -> bool:
        tensor = types.SimpleNamespace(desc=types.SimpleNamespace(format=form, type=dtype))
        return plugin.supports_format_combination(position, [tensor] * 3, 2)

    assert taken(0, half, linear) and taken(1, trt.DataType.BOOL, linear) and taken(2, half, linear)
    assert not taken(0, half, trt.TensorFormat.CHW2) and not taken(2, half, trt.TensorFormat.HWC8)
    assert not taken(0, trt.DataType.FLOAT, linear) and not taken(1, half, linear)
