"""`make gpu-check`: what only a GPU can tell about the fused kernels and the engines, in ten minutes.

It needs the tree, torch, triton and transformers, and nothing installed; each part says what else it lacks.
"""
