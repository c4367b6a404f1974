"""What every rewrite is."""

import onnx_ir as ir


class OrtRewrite(ir.passes.InPlacePass):
    """A pass that counts what it replaced."""

    replaced = 0
