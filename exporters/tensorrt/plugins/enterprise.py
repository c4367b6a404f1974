"""Plugins as enterprise TensorRT takes them: `tensorrt.plugin` definitions whose kernels are compiled already, so that
an engine holds their PTX and runs without Python. A variant is a tactic.

`trt` is the library, which whoever calls has imported.
"""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from exporters.fusion import NAMESPACE
from exporters.fusion.formula import evaluate
from exporters.tensorrt.dtypes import TENSORRT_DTYPES

_COMBINATION = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16", "int32": "INT32", "bool": "BOOL"}


def register(trt: Any, described: Mapping[str, dict[str, Any]]) -> int:
    """Make plugins known to the library that builds: by name, what `compile_nodes` says of each for one target. ->
    the flags of a network that has them."""
    plugin = importlib.import_module(f"{trt.__name__}.plugin")
    for name, what in described.items():
        _define(trt, plugin, name, what)
    return 1 << int(trt.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS)


def _define(trt: Any, plugin: Any, name: str, described: dict[str, Any]) -> None:
    """The three functions of one plugin. Their signatures, which the library reads, have a tensor for every input."""
    where = f"{NAMESPACE}::{name}"
    tensor = plugin.TensorDesc
    count, outputs = len(described["inputs"]), described["outputs"]
    tensors = [_argument(f"input{place}", tensor) for place in range(count)]
    made = _argument("outputs", tuple[(tensor,) * len(outputs)])  # type: ignore[misc]  # as many as there are

    def describe(*inputs: Any) -> Any:
        found = []
        for output in outputs:
            shape = tuple(_value(size, inputs) for size in output["shape"])
            dtype = getattr(trt.DataType, TENSORRT_DTYPES[output["dtype"]])
            found.append(plugin.from_shape_expr(shape, dtype=dtype))
        return tuple(found)

    def tune(*arguments: Any) -> Any:
        dtypes = [*described["inputs"], *(output["dtype"] for output in outputs)]
        combination = ", ".join(_COMBINATION[dtype] for dtype in dtypes)
        return [plugin.AutoTuneCombination(combination, "LINEAR", list(range(1, len(described["variants"]) + 1)))]

    def implement(*arguments: Any) -> Any:
        inputs, tactic = arguments[:count], arguments[-1]
        variant = described["variants"][tactic - 1]
        (kernel,) = variant["kernels"]
        launch = plugin.KernelLaunchParams()
        launch.grid_x, launch.grid_y, launch.grid_z = (_value(size, inputs) for size in variant["grid"])
        launch.block_x, launch.shared_mem = 32 * kernel["num_warps"], kernel["shared"]
        sizes = plugin.SymIntExprs(len(described["sizes"]))
        for place, size in enumerate(described["sizes"]):
            sizes[place] = plugin.SymInt32(_value(size, inputs))
        return kernel["entry"], kernel["ptx"], launch, sizes

    returned = tuple[str | bytes, str | bytes, plugin.KernelLaunchParams, plugin.SymIntExprs]
    plugin.register(where)(_signed(describe, tensors, made.annotation))
    plugin.autotune(where)(_signed(tune, [*tensors, made], list[plugin.AutoTuneCombination]))
    plugin.aot_impl(where)(_signed(implement, [*tensors, made, _argument("tactic", int)], returned))


def _value(size: Any, inputs: Any) -> Any:
    """A size as the library writes it: symbolic dimensions know the operations of a formula."""
    return evaluate(size, lambda place, axis: inputs[place].shape_expr[axis])


def _argument(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)


def _signed(function: Any, parameters: list[inspect.Parameter], returns: Any) -> Any:
    function.__signature__ = inspect.Signature(parameters, return_annotation=returns)
    return function
