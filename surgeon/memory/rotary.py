"""Rotary position embedding of a graft's own queries and keys, in the rotate-half form."""

from collections.abc import Sequence

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]
"""cos and sin, fp32 [B, S, hd / 2]."""


class Rope:
    """Frequencies theta^(-2i / hd), each turning with one axis of the positions. It has no state and no parameters."""

    def __init__(self, head_dim: int, theta: float, axes: Sequence[int] | None = None) -> None:
        """`axes`: for each of the head_dim / 2 frequencies the axis it turns with; None where positions have one."""
        self.head_dim, self.theta = head_dim, theta
        self.axes = tuple(axes) if axes is not None else (0,) * (head_dim // 2)

    def inv_freq(self, device: torch.device | None = None) -> Tensor:
        """fp32 [hd / 2]."""
        steps = torch.arange(0, self.head_dim, 2, dtype=torch.int64, device=device).float() / self.head_dim
        return 1.0 / self.theta**steps

    def __call__(self, position_ids: Tensor) -> Rotary:
        """position_ids int64 [A, B, S] -> cos, sin fp32 [B, S, hd / 2]."""
        positions = position_ids.float()
        if positions.shape[0] == 1 or not any(self.axes):  # text alone is the same on every axis
            axis_positions = positions[0, :, :, None]
        else:  # not by an index, which would be copied to the device at every token
            axis_positions = torch.stack([positions[axis] for axis in self.axes], -1)
        angles = axis_positions * self.inv_freq(position_ids.device)
        return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """x [B, H, S, hd], turned by its token's angles; computed in x's dtype, as transformers does."""
    cos, sin = (part.to(x.dtype)[:, None] for part in rotary)
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half:]  # not by `chunk`, which exports as a sequence
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def split_axes(position_ids: Tensor, batch_size: int) -> Tensor:
    """The position ids that a text model takes, [S], [B, S], [3, B, S], or [4, B, S] whose first is the text's, as
    [A, B, S]."""
    if position_ids.ndim == 1:
        position_ids = position_ids[None]
    if position_ids.ndim == 2:
        return position_ids.expand(batch_size, -1)[None]
    return position_ids[1:] if position_ids.shape[0] == 4 else position_ids
