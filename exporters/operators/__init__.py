"""Grafts as operators of torch, one file each, computed by their reference implementations in `surgeon/memory`. An
export traces them into one node each; `exporters/kernels/cuda` gives them fused kernels on a GPU."""
