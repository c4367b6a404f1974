"""TensorRT plugins made of the kernels' launches: described by data, so that one class serves them all.

`description` plans and compiles them; `rtx` and `enterprise` show them to the library, in the process where it builds;
`launch` runs them by the CUDA driver. What runs beside the library imports the standard library alone.
"""

NAMESPACE = "surgeon"
VERSION = "1"
FORMAT = 1
"""Of the descriptions that engines carry; raised when they say other things."""
