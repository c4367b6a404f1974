"""What every rewrite of an exported graph is, and what several of them ask of nodes."""

import onnx_ir as ir


class Rewrite(ir.passes.InPlacePass):
    """A pass that computes what the graph did before. It says in `replaced` how many nodes it replaced or added
    something to, and leaves alone what it does not know."""

    replaced = 0


def is_standard(node: ir.Node | None, op_type: str) -> bool:
    """Whether it is this operator of ONNX itself."""
    return node is not None and node.op_type == op_type and node.domain in ("", "ai.onnx")


def static(size: "int | ir.SymbolicDim | None") -> int | None:
    return size if isinstance(size, int) else None
