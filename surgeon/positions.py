"""Position ids of a prompt on the host: the family's own, or RoPE-DHR's where the checkpoint records it."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from transformers import PretrainedConfig

from surgeon.errors import InputError
from surgeon.families import Family, Grid
from surgeon.memory.patched import RECORD
from surgeon.memory.rope_dhr import position_ids as compressed_position_ids

Positions = Literal["dhr", "plain"]


def record_of(config: PretrainedConfig) -> dict[str, Any]:
    """What a patched config records; nothing for a plain one."""
    return getattr(config, RECORD, None) or {}


def choose_positions(config: PretrainedConfig, positions: Positions | None) -> Positions | None:
    """The positions of a request; None where there is nothing to choose. Raises InputError for a choice that the
    checkpoint does not offer."""
    offered = record_of(config).get("positions") is not None
    if positions not in (None, "dhr", "plain"):
        raise InputError(f"unknown positions {positions!r}; there are dhr and plain")
    if positions == "dhr" and not offered:
        raise InputError("this checkpoint has no RoPE-DHR positions; patch it with --pass rope-dhr, or use plain ones")
    return (positions or "dhr") if offered else None


def grid_in_sequence(config: PretrainedConfig, grid: Grid) -> Grid:
    """The grid of what stands in the sequence for an image: the thumbnail, where tiles go to the memory alone."""
    return (1, 1, 1) if record_of(config).get("allocation") == "memory" else grid


def position_ids(
    family: Family,
    config: PretrainedConfig,
    input_ids: np.ndarray,
    attention_mask: np.ndarray,
    grids: Sequence[Sequence[Grid]],
    positions: Positions | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """As `Family.position_ids`, with the positions of `choose_positions`: `[A, B, S]` and `[B]`, int64.

    Raises InputError where a row's visual tokens and grids do not match.
    """
    record = record_of(config)
    # where tiles go to the memory alone, the sequence has thumbnails, whose positions are plain
    if positions != "dhr" or record.get("allocation") == "memory":
        return family.position_ids(config, input_ids, attention_mask, grids)
    layout, scheme = record["layout"], record["positions"]
    visual = np.isin(input_ids, family.visual_token_ids(config)) & (attention_mask != 0)
    tile_grids = [grid[1:] for row in grids for grid in row]
    try:
        ids = compressed_position_ids(
            torch.from_numpy(visual),
            torch.from_numpy(attention_mask),
            torch.tensor(tile_grids, dtype=torch.int64).view(-1, 2),
            layout["side"],
            layout["thumbnail"],
            scheme["tile_order"],
        ).numpy()
    except ValueError as error:
        raise InputError(str(error)) from None
    return ids[None], ids.max(1) + 1
