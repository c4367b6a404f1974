"""What every rewrite is, and what several of them ask of nodes and values."""

import numpy as np
import onnx_ir as ir


class TensorRTRewrite(ir.passes.InPlacePass):
    """A pass over a graph without functions. It says in `replaced` how many nodes it replaced or added something to,
    and leaves alone what it does not know."""

    replaced = 0


def is_standard(node: ir.Node | None, op_type: str) -> bool:
    """Whether it is this operator of ONNX itself."""
    return node is not None and node.op_type == op_type and node.domain in ("", "ai.onnx")


def constant(model: ir.Model, values: list[int]) -> ir.Value:
    """An int64 initialiser [n], one for each content."""
    name = "tensorrt_" + "_".join(str(value).replace("-", "minus") for value in values)
    if name not in model.graph.initializers:
        tensor = ir.tensor(np.array(values, dtype=np.int64), name=name)
        model.graph.initializers.add(
            ir.Value(
                name=name,
                shape=ir.Shape([len(values)]),
                type=ir.TensorType(ir.DataType.INT64),
                const_value=tensor,
            )
        )
    return model.graph.initializers[name]


def static(size: "int | ir.SymbolicDim | None") -> int | None:
    return size if isinstance(size, int) else None
