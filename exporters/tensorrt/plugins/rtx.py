"""Plugins as TensorRT for RTX takes them: one class, configured by data.

`trt` is the library, which whoever calls has imported: this runs in the process that builds engines, and in the one
that runs them.
"""

import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from exporters.fusion import FORMAT, NAMESPACE, VERSION
from exporters.fusion.formula import evaluate
from exporters.tensorrt.dtypes import TENSORRT_DTYPES
from exporters.tensorrt.plugins.launch import Driver

_FIELD = "described"
_OPERATIONS = {"+": "SUM", "*": "PROD", "//": "FLOOR_DIV"}


_registered: list[Any] = []
"""Creators: the library's registry points to them for as long as the process lives."""


def register(trt: Any, descriptions: Mapping[str, dict[str, Any]]) -> int:
    """Register plugins with the library that builds. `descriptions`: those of `compile_nodes`, by name. -> the flags
    of a network that has them."""
    _register(trt, descriptions, descriptions)
    return 0


def register_runtime(trt: Any, names: Iterable[str]) -> None:
    """Make plugins known to the library that loads engines, which say themselves what each plugin is."""
    _register(trt, names, {})


def _register(trt: Any, names: Iterable[str], descriptions: Mapping[str, dict[str, Any]]) -> None:
    registry, driver = trt.get_plugin_registry(), Driver()
    plugin_class, creator_class = _plugin_class(trt, driver), _creator_class(trt)
    registered = {(creator.name, creator.plugin_version, creator.plugin_namespace) for creator in registry.all_creators}
    for name in names:
        if (name, VERSION, NAMESPACE) not in registered:
            _registered.append(creator_class(name, descriptions.get(name), plugin_class))
            registry.register_creator(_registered[-1], NAMESPACE)


def _creator_class(trt: Any) -> Any:
    base: Any = trt.IPluginCreatorV3One

    class Creator(base):
        def __init__(self, name: str, description: dict[str, Any] | None, plugin_class: Any) -> None:
            base.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = name, NAMESPACE, VERSION
            self.field_names = trt.PluginFieldCollection([])
            self.description, self.plugin_class = description, plugin_class

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            """Of a node that is parsed, or of an engine that is loaded, which carries the description."""
            carried = [field for field in fields if field.name == _FIELD]
            description: Any = json.loads(zlib.decompress(bytes(carried[0].data))) if carried else self.description
            if description["format"] != FORMAT:
                raise ValueError(f"{self.name} is of another version of surgeon: build the engine again")
            return self.plugin_class(self.name, description)

    return Creator


def _plugin_class(trt: Any, driver: Driver) -> Any:
    base: Any = trt.IPluginV3
    core: Any = trt.IPluginV3OneCore
    build: Any = trt.IPluginV3OneBuild
    runtime: Any = trt.IPluginV3OneRuntime

    class Plugin(base, core, build, runtime):
        def __init__(self, name: str, description: dict[str, Any]) -> None:
            for interface in (base, core, build, runtime):
                interface.__init__(self)
            self.plugin_name, self.plugin_namespace, self.plugin_version = name, NAMESPACE, VERSION
            self.description = description
            self.num_outputs = len(description["outputs"])
            dtypes = [*description["inputs"], *(output["dtype"] for output in description["outputs"])]
            self.dtypes = [getattr(trt.DataType, TENSORRT_DTYPES[dtype]) for dtype in dtypes]
            # what TensorRT keeps of a field is its address
            self.carried = zlib.compress(json.dumps(description).encode(), 9)

        def get_capability_interface(self, type: Any) -> Any:
            return self

        def clone(self) -> Any:
            return type(self)(self.plugin_name, self.description)

        # -- building --------------------------------------------------------------------------------------------
        def get_output_data_types(self, input_types: Any) -> list[Any]:
            return self.dtypes[-self.num_outputs :]

        def get_output_shapes(self, inputs: Any, shape_inputs: Any, builder: Any) -> list[Any]:
            def apply(operation: str, a: Any, b: Any) -> Any:
                return builder.operation(getattr(trt.DimensionOperation, _OPERATIONS[operation]), a, b)

            shapes = []
            for output in self.description["outputs"]:
                dims = trt.DimsExprs(len(output["shape"]))
                for axis, size in enumerate(output["shape"]):
                    dims[axis] = evaluate(size, lambda place, axis: inputs[place][axis], builder.constant, apply)
                shapes.append(dims)
            return shapes

        def configure_plugin(self, inputs: Any, outputs: Any) -> None: ...

        def supports_format_combination(self, position: int, tensors: Any, num_inputs: int) -> bool:
            desc = tensors[position].desc
            return bool(desc.format == trt.TensorFormat.LINEAR and desc.type == self.dtypes[position])

        def get_fields_to_serialize(self) -> Any:
            return trt.PluginFieldCollection([trt.PluginField(_FIELD, self.carried, trt.PluginFieldType.UNKNOWN)])

        # -- running ---------------------------------------------------------------------------------------------
        def on_shape_change(self, inputs: Any, outputs: Any) -> None: ...

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def enqueue(
            self, input_desc: Any, output_desc: Any, inputs: Any, outputs: Any, workspace: int, stream: int
        ) -> int:
            dims = [tuple(desc.dims) for desc in input_desc]
            driver.run(self.description, dims, list(inputs), list(outputs), stream)
            return 0

    return Plugin
