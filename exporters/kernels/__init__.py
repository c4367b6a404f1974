"""Fused kernels of the grafts, in Triton, each beside its plain definition; see docs/kernels.md."""
