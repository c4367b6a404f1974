"""One graph put together from traced parts.

Tracing costs milliseconds a node, and the layers of a decoder are the same nodes over other weights: a layer is traced
once for each of its kinds, and its graph instantiated per layer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from exporters.onnx.functions import IR_VERSION, OPSET
from exporters.onnx.trace import Program, clean


class Assembly:
    """A graph under construction: add parts in topological order, then `finish`."""

    def __init__(self, name: str) -> None:
        self.graph = ir.Graph([], [], nodes=[], name=name, opset_imports={"": OPSET})
        self.functions: dict[Any, ir.Function] = {}

    def add(
        self, part: ir.Model, inputs: Mapping[str, ir.Value | str], weights: Mapping[str, str], suffix: str = ""
    ) -> dict[str, ir.Value]:
        """Instantiate `part`; -> its outputs, by their names in the part.

        inputs: for each of the part's inputs a value, or the name of an input of the whole, which is added where there
        is none yet. weights: the part's initialisers without values -> their names in the whole. All other
        names, of inputs that are not in `inputs` too, are those of the part with `suffix` appended.
        """
        instance = part.graph.clone()
        outputs = {str(value.name): value for value in instance.outputs}
        arguments, initializers, nodes = list(instance.inputs), list(instance.initializers.values()), list(instance)
        for members in (instance.inputs, instance.outputs, instance.initializers):
            members.clear()
        instance.remove(nodes)

        graph_inputs = {value.name: value for value in self.graph.inputs}
        for value in arguments:
            binding = inputs.get(str(value.name), f"{value.name}{suffix}")
            if isinstance(binding, str):
                if binding not in graph_inputs:
                    value.name = binding
                    self.graph.inputs.append(value)
                    continue
                binding = graph_inputs[binding]
            value.replace_all_uses_with(binding)
        for value in initializers:
            name = weights.get(str(value.name), f"{value.name}{suffix}")
            if name in self.graph.initializers:
                value.replace_all_uses_with(self.graph.initializers[name])
            else:
                value.name = name
                self.graph.initializers.add(value)
        for node in nodes:
            node.name = f"{node.name}{suffix}"
            for value in node.outputs:
                value.name = f"{value.name}{suffix}"
        self.graph.extend(nodes)
        self.functions |= part.functions
        self.graph.opset_imports.update(part.opset_imports)
        return outputs

    def add_node(self, op_type: str, inputs: Sequence[ir.Value], name: str) -> ir.Value:
        """One node; -> its output, of the first input's shape and type, called `name`."""
        node = ir.node(op_type, inputs, name=f"node_{name}")
        output = node.outputs[0]
        output.name, output.shape, output.type = name, inputs[0].shape, inputs[0].type
        self.graph.append(node)
        return output

    def reads(self, name: str) -> bool:
        """Whether something uses the input of this name."""
        return any(value.name == name and value.uses() for value in self.graph.inputs)

    def finish(self, input_names: Sequence[str], outputs: Sequence[ir.Value]) -> ir.Model:
        """The model, its inputs in the order of `input_names`."""
        inputs = {str(value.name): value for value in self.graph.inputs}
        self.graph.inputs.clear()
        self.graph.inputs.extend(inputs[name] for name in input_names)
        self.graph.outputs.extend(outputs)
        model = ir.Model(self.graph, ir_version=IR_VERSION, functions=list(self.functions.values()))
        clean(model)
        return model


def single(name: str, program: Program, weights: Mapping[str, str]) -> ir.Model:
    """A graph of one part. weights: the program's parameter names -> the model's own."""
    assembly = Assembly(name)
    outputs = assembly.add(program.trace(), {name: name for name in program.input_names}, weights)
    return assembly.finish(program.input_names, [outputs[name] for name in program.output_names])
