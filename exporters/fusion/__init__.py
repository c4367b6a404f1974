"""Grafts' chains of launches as nodes of an ONNX graph: described by data, so that one class of a runtime's serves all.

`fused_kernels` puts them into a graph, `node` plans and compiles them. What runs beside a runtime's library reads the
descriptions, with the standard library alone.
"""

NAMESPACE = "surgeon"
"""The nodes' domain."""
VERSION = "1"
FORMAT = 2
"""Of the descriptions that engines carry; raised when they say other things."""
