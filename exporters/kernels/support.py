"""The shapes and devices that the kernels support. All others are computed by the reference implementations."""

import os
import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from surgeon.dtypes import name_of

SWITCH = "SURGEON_KERNELS"
"""The environment variable that keeps grafts plain, for a comparison, where it says "standard"."""
_LEAST, _MOST = 32, 256
_CAPABILITY = (8, 0)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def reason_against(kind: str, head_dim: int, dtypes: set[torch.dtype]) -> str | None:
    """Why the kernels of a graft cannot take these; None where they can. `dtypes`: of everything but cos and sin."""
    if head_dim & (head_dim - 1) or not _LEAST <= head_dim <= _MOST:
        return f"{kind}: no fused kernel for head_dim {head_dim}, which is no power of two from {_LEAST} to {_MOST}"
    if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
        names = ", ".join(sorted(name_of(dtype) for dtype in dtypes))
        return f"{kind}: no fused kernel for tensors of {names}; they take float32, float16 or bfloat16, one at a time"
    return None


@cache
def reason_against_device(index: int | None) -> str | None:
    """Why kernels do not run on a CUDA device; None where they do."""
    if os.environ.get(SWITCH) == "standard":
        return f"no fused kernels: {SWITCH}=standard"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "no fused kernels: triton is not installed (pip install 'lvlm-surgeon[kernels]')"
    capability = torch.cuda.get_device_capability(index)
    if capability < _CAPABILITY:
        return f"no fused kernels: this GPU's compute capability is {capability[0]}.{capability[1]}, and they need 8.0"
    return None


@cache
def warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


_OF_ANY_DTYPE = ("cos", "sin")


def fits(kind: str, head_dim: int, arguments: Mapping[str, Any]) -> bool:
    """Whether the kernels of a graft take these arguments of its reference implementation; if not, a warning
    gives the reason once."""
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    dtypes = {t.dtype for name, t in tensors.items() if t.dtype != torch.bool and name not in _OF_ANY_DTYPE}
    reason = reason_against(kind, head_dim, dtypes)
    devices = {tensor.device for tensor in tensors.values()}
    if reason is None and len(devices) > 1:
        reason = f"{kind}: no fused kernel over several devices"
    if reason is None and (device := devices.pop()).type == "cuda":
        reason = reason_against_device(device.index)
    if reason is not None:
        warn_once(f"{reason}; computed by its reference implementation")
    return reason is None
