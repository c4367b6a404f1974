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


def register(trt: Any, descriptions: Mapping[str, dict[str, Any]]) -> int:
    """Register plugins with the library that builds. `descriptions`: those of `compile_nodes` for one target, by name.
    -> the flags of a network that has them."""
    plugin = importlib.import_module(f"{trt.__name__}.plugin")
    for name, description in descriptions.items():
        _define(trt, plugin, name, description)
    return 1 << int(trt.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS)


def _define(trt: Any, plugin: Any, name: str, description: dict[str, Any]) -> None:
    """The three functions of one plugin. Their signatures, which the library reads, have a tensor for every input."""
    where = f"{NAMESPACE}::{name}"
    tensor = plugin.TensorDesc
    count, outputs = len(description["inputs"]), description["outputs"]
    tensors = [_argument(f"input{place}", tensor) for place in range(count)]
    output_argument = _argument("outputs", tuple[(tensor,) * len(outputs)])  # type: ignore[misc]  # as many as there are

    def describe(*inputs: Any) -> Any:
        results = []
        for output in outputs:
            shape = tuple(_value(size, inputs) for size in output["shape"])
            dtype = getattr(trt.DataType, TENSORRT_DTYPES[output["dtype"]])
            results.append(plugin.from_shape_expr(shape, dtype=dtype))
        return tuple(results)

    def tune(*arguments: Any) -> Any:
        dtypes = [*description["inputs"], *(output["dtype"] for output in outputs)]
        combination = ", ".join(_COMBINATION[dtype] for dtype in dtypes)
        return [plugin.AutoTuneCombination(combination, "LINEAR", list(range(1, len(description["variants"]) + 1)))]

    def implement(*arguments: Any) -> Any:
        inputs, tactic = arguments[:count], arguments[-1]
        variant = description["variants"][tactic - 1]
        (kernel,) = variant["kernels"]
        launch = plugin.KernelLaunchParams()
        launch.grid_x, launch.grid_y, launch.grid_z = (_value(size, inputs) for size in variant["grid"])
        launch.block_x, launch.shared_mem = 32 * kernel["num_warps"], kernel["shared"]
        sizes = plugin.SymIntExprs(len(description["sizes"]))
        for place, size in enumerate(description["sizes"]):
            sizes[place] = plugin.SymInt32(_value(size, inputs))
        return kernel["entry"], kernel["ptx"], launch, sizes

    returned = tuple[str | bytes, str | bytes, plugin.KernelLaunchParams, plugin.SymIntExprs]
    plugin.register(where)(_signed(describe, tensors, output_argument.annotation))
    plugin.autotune(where)(_signed(tune, [*tensors, output_argument], list[plugin.AutoTuneCombination]))
    plugin.aot_impl(where)(_signed(implement, [*tensors, output_argument, _argument("tactic", int)], returned))


def _value(size: Any, inputs: Any) -> Any:
    """A size as the library writes it: symbolic dimensions know the operations of a formula."""
    return evaluate(size, lambda place, axis: inputs[place].shape_expr[axis])


def _argument(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)


def _signed(function: Any, parameters: list[inspect.Parameter], returns: Any) -> Any:
    function.__signature__ = inspect.Signature(parameters, return_annotation=returns)
    return function
