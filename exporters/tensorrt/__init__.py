"""NVIDIA engines of a bundle's graphs, by TensorRT or TensorRT for RTX: built in a child process, without a GPU where
the library can."""
