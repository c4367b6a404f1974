"""What the grafts read in one call of the decoder, and what enters the memory with it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from surgeon.memory.rotary import Rotary
from surgeon.memory.visual_memory import Entries

Project = Callable[[Tensor, Rotary | None], tuple[Tensor, Tensor]]
"""Visual embeddings [B, M, d] and their angles -> keys, values [B, Hm, M, hd]."""


@dataclass(frozen=True)
class Reading:
    """One call's. A graft adds its part of what enters in its own layer's forward, where its weights are at hand
    however they are sharded, offloaded or quantised."""

    entries: Entries
    """What was in the memory before this call."""
    mask: Tensor
    """bool [B, M], or [B, S, M] where tokens of a row see different slots; those of this call included."""
    visual_token_mask: Tensor | None
    """bool [B, S], True at visual tokens."""
    rotary: dict[str, Rotary]
    """The angles of the tokens' positions, by kind of graft, for those that have a `rope`."""
    entering: Tensor | None = None
    """[B, M', d]: the visual embeddings that enter in this call."""
    entering_rotary: dict[str, Rotary] = field(default_factory=dict)
    """The angles of their positions, as `rotary`."""
    joined: Entries = field(default_factory=dict)
    """What the memory holds after this call, filled in as the layers run."""

    def entry(self, name: str, kind: str, dtype: torch.dtype, project: Project) -> tuple[Tensor, Tensor]:
        """Keys and values [B, Hm, M, hd] of one entry. Those that enter are computed by `project`, of embeddings in
        `dtype`. What it says depends on no call before it, so that a checkpointed layer may run again."""
        if self.entering is None:
            return self.entries[name]
        keys, values = project(self.entering.to(dtype), self.entering_rotary.get(kind))
        if name in self.entries:
            old_keys, old_values = self.entries[name]
            keys, values = torch.cat((old_keys, keys), 2), torch.cat((old_values, values), 2)
        # read at every step, so they lie in order
        self.joined[name] = keys.contiguous(), values.contiguous()
        return self.joined[name]

    def to(self, device: Any, non_blocking: bool = False) -> "Reading":
        """For a layer on another device: accelerate calls this on a layer's inputs. Entries stay on their layer's
        device."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        def angles(rotary: dict[str, Rotary]) -> dict[str, Rotary]:
            return {kind: (moved(cos), moved(sin)) for kind, (cos, sin) in rotary.items()}  # type: ignore[misc]

        return replace(
            self,
            mask=self.mask.to(device, non_blocking=non_blocking),
            visual_token_mask=moved(self.visual_token_mask),
            rotary=angles(self.rotary),
            entering=moved(self.entering),
            entering_rotary=angles(self.entering_rotary),
        )
