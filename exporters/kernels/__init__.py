"""Fused kernels of the grafts, in Triton, each beside its reference implementation; see docs/kernels.md."""
