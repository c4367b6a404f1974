"""What a Qwen-VL's inputs need computed on the host, in numpy, bit for bit as transformers computes it with torch."""

from collections.abc import Iterator, Sequence

import numpy as np

from surgeon.errors import InputError
from surgeon.families._base import Grid


def check_grid(grid: Grid, merge: int, patches: int) -> None:
    """Raises InputError unless `grid` is one image's, divisible by the merge size and of `patches` patches."""
    frames, height, width = grid
    if frames != 1:
        raise InputError(f"grid {tuple(grid)} has {frames} frames: video is not supported yet, pass single images")
    if height % merge or width % merge:
        raise InputError(
            f"grid {tuple(grid)} is not divisible by the merge size {merge}: use the checkpoint's image processor"
        )
    if height * width != patches:
        raise InputError(f"grid {tuple(grid)} has {height * width} patches, but pixel_values has {patches} rows")


def patch_positions(grid: Grid, merge: int) -> np.ndarray:
    """Row and column of each patch, int64 [N, 2], in the order of the patches: merge x merge blocks, row by row."""
    _, height, width = grid
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    blocks = (height // merge, merge, width // merge, merge)
    order = [a.reshape(blocks).transpose(0, 2, 1, 3).ravel() for a in (rows, columns)]
    return np.stack(order, -1).astype(np.int64)


def interpolation(positions: np.ndarray, grid: Grid, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Bilinear taps (corners aligned) into a learned side x side table: indices int64 and weights fp32, both [N, 4]."""
    taps, weights = [], []
    offsets = np.arange(2)
    for axis in range(2):
        # fp32 in this order of operations: anything else differs from torch in the last bit
        source = positions[:, axis].astype(np.float32) * np.float32(side - 1) / np.float32(max(grid[axis + 1] - 1, 1))
        floor = np.floor(source)
        taps.append(np.clip(floor.astype(np.int64)[:, None] + offsets, 0, side - 1))
        distance = np.abs(source[:, None] - floor[:, None] - offsets.astype(np.float32))
        weights.append(np.maximum(1 - distance, 0).astype(np.float32))
    index = (taps[0][:, :, None] * side + taps[1][:, None, :]).reshape(-1, 4)
    return index, (weights[0][:, :, None] * weights[1][:, None, :]).reshape(-1, 4)


def window_order(grid: Grid, merge: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Window attention's order: merged positions window by window, int64 [N / merge²], and each window's patches [W].

    A window spans `side` x `side` merged positions; those at the right and lower edge may be smaller.
    """
    height, width = grid[1] // merge, grid[2] // merge
    index = np.arange(height * width, dtype=np.int64).reshape(height, width)
    windows = [index[i : i + side, j : j + side].ravel() for i in range(0, height, side) for j in range(0, width, side)]
    return np.concatenate(windows), np.array([w.size * merge * merge for w in windows], dtype=np.int64)


def window_batch(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows of `lengths` patches as a batch of `capacity`-long rows: `gather` [W, capacity] reads the patches (in
    window order) into the rows, a row's first patch where there is none; `scatter` [N] reads them back. int64."""
    starts = np.cumsum(lengths) - lengths
    slots = np.arange(capacity)[None]
    filled = slots < lengths[:, None]
    gather = np.where(filled, starts[:, None] + slots, starts[:, None])
    return gather.astype(np.int64), np.flatnonzero(filled).astype(np.int64)


def _runs(flags: np.ndarray) -> Iterator[tuple[bool, int]]:
    """Runs of equal values: (value, length)."""
    edges = np.flatnonzero(np.diff(flags)) + 1
    for run in np.split(flags, edges):
        yield bool(run[0]), run.size


def mrope_row(is_image: np.ndarray, grids: Sequence[Grid], merge: int, row: int) -> np.ndarray:
    """Positions [3, S] of one unpadded row: text advances all axes; an image spans its frames, rows and columns, and
    the text after it continues from its larger side. Raises InputError where tokens and grids do not match."""
    parts: list[np.ndarray] = []
    position, remaining = 0, iter(grids)
    num_images = 0
    for is_image_run, length in _runs(is_image):
        if not is_image_run:
            parts.append(np.broadcast_to(np.arange(position, position + length), (3, length)))
            position += length
            continue
        while length > 0:  # a run may be several images side by side
            grid = next(remaining, None)
            if grid is None:
                raise InputError(f"prompt row {row} has image tokens for more than its {len(grids)} image(s)")
            num_images += 1
            frames, height, width = grid[0], grid[1] // merge, grid[2] // merge
            length -= frames * height * width
            if length < 0:
                raise InputError(
                    f"prompt row {row} has {-length} image token(s) too few for image {num_images} of grid "
                    f"{tuple(grid)}"
                )
            parts.append(np.indices((frames, height, width)).reshape(3, -1) + position)
            position += max(height, width)
    if num_images != len(grids):
        raise InputError(f"prompt row {row} has image tokens for {num_images} image(s), but {len(grids)} were given")
    return np.concatenate(parts, axis=1)
