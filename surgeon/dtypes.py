"""The dtypes that models come in, and what they are called."""

import torch

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""By their names on the command line, the finer before the coarser."""


def precision_of(dtype: torch.dtype) -> str:
    """fp32, fp16 or bf16. Raises KeyError for another dtype."""
    return {each: name for name, each in PRECISIONS.items()}[dtype]


def name_of(dtype: torch.dtype) -> str:
    """As torch and numpy write it: float32, bfloat16."""
    return str(dtype).removeprefix("torch.")
