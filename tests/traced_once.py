"""Exports of tiny models, made quick: what one worker has traced, all of a run take.

Most of an export's time is spent tracing modules of a few layers, which the next test's model has too. A trace is known
by the pickled module, on the meta device, its inputs and their names, and the grafts that are functions: equal bytes
are an equal module.
"""

import hashlib
import io
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from filelock import FileLock
from transformers import PretrainedConfig

from exporters.onnx import functions
from exporters.onnx import trace as tracing
from surgeon.memory.graft import Graft


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, PretrainedConfig):  # whatever of it may be of one directory is no part of what it computes
            content = {name: each for name, each in vars(value).items() if name not in ("_name_or_path", "surgeon")}
            return _config, (type(value).__qualname__, content)
        return NotImplemented


def _config(name: str, content: dict[str, Any]) -> None:
    raise TypeError("these bytes are compared, never loaded")


def _key(*arguments: Any) -> str:
    content = io.BytesIO()
    _Pickler(content).dump(arguments)
    return hashlib.sha256(content.getvalue()).hexdigest()


_OUTPUT = "output: "


def _write(model: ir.Model, path: Path) -> None:
    """Initialisers have no values here, and an output may be called as an input is, neither of which a file can say: in
    it the former are inputs, behind the others, and the latter have names of their own."""
    proto = ir.to_proto(ir.Model(_with_inputs(model.graph.clone()), ir_version=model.ir_version))
    proto.functions.extend(ir.to_proto(function) for function in model.functions.values())
    staged = path.with_suffix(f".{os.getpid()}")
    staged.write_bytes(len(model.graph.inputs).to_bytes(4, "little") + proto.SerializeToString())
    staged.rename(path)


def _with_inputs(graph: ir.Graph) -> ir.Graph:
    valueless = [value for value in graph.initializers.values() if value.const_value is None]
    for value in valueless:
        del graph.initializers[str(value.name)]
        graph.inputs.append(value)
    for value in graph.outputs:
        value.name = f"{_OUTPUT}{value.name}"
    return graph


def _read(path: Path) -> ir.Model:
    content = path.read_bytes()
    count = int.from_bytes(content[:4], "little")
    model = ir.from_proto(onnx.ModelProto.FromString(content[4:]))
    weights = list(model.graph.inputs)[count:]
    del model.graph.inputs[count:]
    for value in weights:
        model.graph.initializers.add(value)
    for value in model.graph.outputs:
        value.name = str(value.name).removeprefix(_OUTPUT)
    return model


trace_afresh = tracing.trace
"""As it is without any of this: for a test that changes what a trace sees, which its key does not know of."""


@contextmanager
def traced_once(folder: Path) -> Iterator[None]:
    """Within it, `exporters.onnx.trace.trace` gives what it gave for the same arguments, kept in `folder`."""
    patch = pytest.MonkeyPatch()
    folder.mkdir(exist_ok=True)

    def quick(module: Any, example: Any, dynamic_shapes: Any, *names: Any) -> ir.Model:
        grafts = {each.kind for each in module.modules() if isinstance(each, Graft)}
        as_functions, dims = sorted(grafts & functions.registry().keys()), repr(dynamic_shapes)
        key = _key(module.eval(), dict(example), dims, as_functions, *map(list, names))
        path = folder / key
        with FileLock(folder / f"{key}.lock"):
            if not path.exists():
                _write(trace_afresh(module, example, dynamic_shapes, *names), path)
        return _read(path)

    patch.setattr(tracing, "trace", quick)
    exporter: Any = pytest.importorskip("torch.onnx._internal.exporter._registration")
    if hasattr(getattr(exporter, "ONNXRegistry", None), "from_torchlib"):  # with another torch tests are slower
        # it parses every operator of its library anew for each graph, a quarter of a tiny model's export
        read_library = cache(exporter.ONNXRegistry.from_torchlib)

        def from_torchlib(*opset: Any, **named: Any) -> Any:
            registry = copy(read_library(*opset, **named))
            registry.functions = {target: list(functions) for target, functions in registry.functions.items()}
            return registry

        patch.setattr(exporter.ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))
    yield
    patch.undo()
