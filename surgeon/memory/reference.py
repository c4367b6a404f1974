"""Reference implementations: what a graft computes, as a function of tensors alone.

Its parameters are where the order of a graft's arguments is written. What a call brings is named as in `INPUTS`;
`eps` is the graft's; the rest are its weights, each called as the part that it is of. Operators, kernels and exported
functions take their order from here.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from surgeon.memory.rms_norm import rms_norm

INPUTS = (
    "hidden_states", "visual_embeds", "keys", "values", "memory_mask", "visual_token_mask", "cos", "sin", "residual",
)  # fmt: skip
Reference = Callable[..., Any]
Layer = Callable[[Tensor], Tensor]
"""A projection or a norm: a module, or a weight and what is done with it."""


def matrix(weight: Tensor) -> Layer:
    """The projection that multiplies by a weight [out, in]."""
    return partial(F.linear, weight=weight)


def rms_norm_layer(weight: Tensor, eps: float) -> Layer:
    """The RMS norm over the last axis with a weight [d]."""
    return partial(rms_norm, weight=weight, eps=eps)


@cache
def argument_names(reference: Reference) -> tuple[str, ...]:
    """Its arguments, in its order."""
    return tuple(inspect.signature(reference).parameters)


@cache
def tensor_names(reference: Reference) -> tuple[str, ...]:
    """Those of its arguments that are tensors: all but `eps`."""
    return tuple(name for name in argument_names(reference) if name != "eps")


def weight_names(reference: Reference | None) -> tuple[str, ...]:
    """Those of its arguments that are weights; none of no function."""
    return () if reference is None else tuple(name for name in tensor_names(reference) if name not in INPUTS)


def named(reference: Reference, arguments: Sequence[Any]) -> dict[str, Any]:
    """Arguments in its order, by name; those left out at the end are None."""
    names = argument_names(reference)
    return dict.fromkeys(names) | dict(zip(names, arguments, strict=False))
