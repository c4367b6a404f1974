"""TensorRT plugins for the kernels' nodes.

`rtx` and `enterprise` show them to the library, in the process where it builds; `launch` runs them by the CUDA driver.
What runs beside the library imports the standard library alone.
"""
