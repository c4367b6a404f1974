"""Enterprise TensorRT's plugin definitions, up to the library's edge: what it checks of a definition is checked here
too, and what it would do with one is done with numbers."""

import inspect
import json
import sys
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from exporters.tensorrt import library as libraries
from exporters.tensorrt.build import Options, build_engines
from exporters.tensorrt.errors import BuildError, EngineError
from exporters.tensorrt.plugins import enterprise
from exporters.tensorrt.profiles import Limits, Range
from pairs import Pair


class TensorDesc:
    def __init__(self, shape_expr: tuple[int, ...], dtype: str) -> None:
        self.shape_expr, self.dtype = shape_expr, dtype


class KernelLaunchParams:
    grid_x = grid_y = grid_z = block_x = block_y = block_z = 1
    shared_mem = 0


class SymInt32:
    def __init__(self, value: int) -> None:
        self.value = value


class SymIntExprs(list[Any]):
    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


class AutoTuneCombination:
    def __init__(self, io_types: str, layouts: str, tactics: list[int]) -> None:
        self.io_types, self.layouts, self.tactics = io_types, layouts, tactics


DESCRIBED = {
    "kernel": "attend",
    "inputs": ["bfloat16", "bool"],
    "outputs": [
        {"dtype": "float32", "shape": [["dim", 0, 0], ["dim", 0, 1], 4]},
        {"dtype": "int32", "shape": [["dim", 0, 0], ["dim", 0, 1]]},
    ],
    "sizes": [["dim", 0, 1], ["dim", 1, 1]],
    "variants": [
        {
            "tokens": 4,
            "grid": [["*", ["dim", 0, 1], 2], 4, ["dim", 0, 0]],
            "kernels": [{"capability": 89, "entry": "one", "ptx": "ptx 1", "shared": 128, "num_warps": 4}],
        },
        {
            "tokens": None,
            "grid": [["//", ["+", ["dim", 0, 1], 15], 16], 4, ["dim", 0, 0]],
            "kernels": [{"capability": 89, "entry": "many", "ptx": "ptx 2", "shared": 512, "num_warps": 8}],
        },
    ],
}


@pytest.fixture
def defined(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[dict[str, dict[str, Any]], int]]:
    """What is defined by name, and the network's flags."""
    registered: dict[str, dict[str, Any]] = {}

    def decorator(what: str) -> Callable[[str], Any]:
        def named(name: str) -> Any:
            namespace, _, rest = name.partition("::")
            assert namespace == "surgeon" and rest and "." not in rest
            return lambda function: registered.setdefault(rest, {}).setdefault(what, function)

        return named

    plugin: Any = types.ModuleType("tensorrt.plugin")
    for each in (TensorDesc, KernelLaunchParams, SymInt32, SymIntExprs, AutoTuneCombination):
        setattr(plugin, each.__name__, each)
    for what in ("register", "autotune", "aot_impl"):
        setattr(plugin, what, decorator(what))
    plugin.from_shape_expr = TensorDesc
    library: Any = types.ModuleType("tensorrt")
    library.DataType = types.SimpleNamespace(FLOAT="FLOAT", HALF="HALF", INT32="INT32", BF16="BF16", BOOL="BOOL")
    library.NetworkDefinitionCreationFlag = types.SimpleNamespace(PREFER_AOT_PYTHON_PLUGINS=3)
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", plugin)
    in_half = {"inputs": ["float16", "bool"], "outputs": [DESCRIBED["outputs"][0] | {"dtype": "float16"}]}
    flags = enterprise.register(library, {"pvm_attend": DESCRIBED, "pvm_text": DESCRIBED | in_half})
    yield registered, flags


INPUTS = (TensorDesc((2, 40, 32), "BF16"), TensorDesc((2, 1000), "BOOL"))


def test_signatures_are_what_the_library_asks_for(defined: Any) -> None:
    functions, flags = defined[0]["pvm_attend"], defined[1]
    assert flags == 1 << 3
    described, tuned, compiled = (inspect.signature(functions[what]) for what in ("register", "autotune", "aot_impl"))
    assert list(described.parameters) == ["input0", "input1"]
    assert list(tuned.parameters) == ["input0", "input1", "outputs"]
    assert list(compiled.parameters) == ["input0", "input1", "outputs", "tactic"]
    for each in described.parameters.values():
        assert each.annotation is TensorDesc and each.default is inspect.Parameter.empty
    assert typing.get_args(described.return_annotation) == (TensorDesc, TensorDesc)
    assert typing.get_origin(tuned.return_annotation) is list
    name, code, params, extra = typing.get_args(compiled.return_annotation)
    assert {*typing.get_args(name), *typing.get_args(code)} == {str, bytes}
    assert (params, extra) == (KernelLaunchParams, SymIntExprs)


def test_outputs_follow_from_the_inputs(defined: Any) -> None:
    acc, arrived = defined[0]["pvm_attend"]["register"](*INPUTS)
    assert (acc.shape_expr, acc.dtype) == ((2, 40, 4), "FLOAT")
    assert (arrived.shape_expr, arrived.dtype) == ((2, 40), "INT32")


def test_forms_are_tactics_of_one_combination(defined: Any) -> None:
    (combination,) = defined[0]["pvm_attend"]["autotune"](*INPUTS, ())
    assert combination.io_types.split(", ") == ["BF16", "BOOL", "FP32", "INT32"]
    assert (combination.layouts, combination.tactics) == ("LINEAR", [1, 2])


def test_float16_is_called_otherwise_in_a_combination_than_among_dtypes(defined: Any) -> None:
    """By the library's documentation: "FP32" and "FP16" in combinations, other dtypes by their names."""
    functions = defined[0]["pvm_text"]
    (output,) = functions["register"](*INPUTS)
    (combination,) = functions["autotune"](*INPUTS, ())
    assert output.dtype == "HALF" and combination.io_types.split(", ") == ["FP16", "BOOL", "FP16"]


@pytest.mark.parametrize(
    ("tactic", "kernel", "grid", "threads", "shared"),
    [(1, ("one", "ptx 1"), (80, 4, 2), 128, 128), (2, ("many", "ptx 2"), (3, 4, 2), 256, 512)],
)
def test_a_tactic_gives_its_kernel(
    defined: Any, tactic: int, kernel: tuple[str, str], grid: tuple[int, int, int], threads: int, shared: int
) -> None:
    entry, ptx, launch, extra = defined[0]["pvm_attend"]["aot_impl"](*INPUTS, (), tactic)
    assert (entry, ptx) == kernel
    assert (launch.grid_x, launch.grid_y, launch.grid_z) == grid
    assert (launch.block_x, launch.block_y, launch.block_z, launch.shared_mem) == (threads, 1, 1, shared)
    assert [each.value for each in extra] == [40, 1000]


# -- in the child -------------------------------------------------------------------------------------------------
FUSED = ("qwen3_vl", ("pvm:layers=1,2,latent=64",), torch.float16)
LIBRARY = """
from tensorrt_rtx import *
__version__ = "11.4.1"

class NetworkDefinitionCreationFlag:
    PREFER_AOT_PYTHON_PLUGINS = 0  # a flag that the stand-in knows
"""
PLUGIN = """
import inspect, json, pathlib

class TensorDesc: ...
class KernelLaunchParams: ...
class SymIntExprs: ...
class AutoTuneCombination: ...

defined = []

def register(name):
    def note(function):
        defined.append([name, len(inspect.signature(function).parameters)])
        pathlib.Path(r"{file}").write_text(json.dumps(defined))
    return note

def autotune(name):
    return lambda function: None

aot_impl = autotune
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """TensorRT for RTX as "tensorrt", with a `tensorrt.plugin` that notes what is defined in the file."""
    folder, file = tmp_path / "packages", tmp_path / "defined.json"
    (package := folder / "tensorrt").mkdir(parents=True)
    (package / "__init__.py").write_text(LIBRARY)
    (package / "plugin.py").write_text(PLUGIN.format(file=file))
    (about := folder / "tensorrt-11.4.1.dist-info").mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: tensorrt\nVersion: 11.4.1\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    libraries._probe.cache_clear()
    yield file
    libraries._probe.cache_clear()


def test_the_child_defines_every_plugin_of_the_graph(
    installed: Path, export: Callable[..., Pair], tmp_path: Path
) -> None:
    """And goes on to parse the graph, where the stand-in, which has no such plugins, stops."""
    bundle = export(*FUSED, visibility="causal", head_dim=32).bundle
    limits = Limits(batch=Range.of(1, 1), prefill=Range.of(1, 4))
    options = Options("tensorrt", "sm89", limits=limits, graphs=("decoder",), kernels="fused")
    with pytest.raises(BuildError, match="tensorrt 11.4.1 does not take the graph: .*pvm_text"):
        build_engines(bundle, tmp_path / "out", options)
    inputs = {"text": 2, "attend": 7, "retrieve": 3, "swiglu": 4, "down": 3, "inject": 7}
    assert dict(json.loads(installed.read_text())) == {f"surgeon::pvm_{step}": count for step, count in inputs.items()}


def test_one_engine_is_for_one_gpu(installed: Path, export: Callable[..., Pair], tmp_path: Path) -> None:
    bundle = export(*FUSED, visibility="causal", head_dim=32).bundle
    options = Options("tensorrt", "sm80,sm89", graphs=("decoder",), kernels="fused")
    with pytest.raises(EngineError, match="sm80, sm89 need one each: name one target, or take --backend tensorrt-rtx"):
        build_engines(bundle, tmp_path / "out", options)
