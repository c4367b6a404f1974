"""RoPE-DHR: the tiles of an image take the position ids of the thumbnail patches that they show in more detail.

Source: "CoMemo: LVLMs Need Image Context with Image Memory", section 3.3, and the authors' implementation. An image
costs the ids of its thumbnail, however many tiles it is cut into.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

TileOrder = Literal["row", "column"]
Thumbnail = Literal["first", "last"]
Tiles = tuple[int, int]
"""Rows and columns of an image's tiles."""


def covered_patches(count: int, side: int) -> Tensor:
    """Along one axis: which of the thumbnail's `side` patches lies under the centre of each of a tile's tokens, for
    `count` tiles; int64 [count, side]."""
    centres = 2 * torch.arange(count * side) + 1  # in halves of a token
    return (centres // (2 * count)).view(count, side)


def published_patches(count: int, side: int) -> Tensor:
    """`covered_patches` by the authors' arithmetic, which differs from it at some borders; int64 [count, side]."""
    width = side / count - 1e-6
    grids = [torch.linspace(i * width, (i + 1) * width, side, dtype=torch.float64) for i in range(count)]
    return torch.stack(grids).floor().long()


def tile_position_ids(rows: int, columns: int, side: int, tile_order: TileOrder = "row") -> Tensor:
    """The ids of each tile's tokens as offsets from the thumbnail's first, int64 [rows * columns, side * side].

    Tiles and tokens go row by row. `tile_order="row"` gives each tile the ids of the patches under it. Weights that the
    authors trained ask for `"column"`: their ids walk the tiles column by column, though the tiles come row by row.
    """
    if tile_order == "row":
        y, x = covered_patches(rows, side), covered_patches(columns, side)
        ids = y[:, None, :, None] * side + x[None, :, None, :]  # [rows, columns, side, side]
    else:
        y, x = published_patches(rows, side), published_patches(columns, side)
        ids = y[None, :, :, None] * side + x[:, None, None, :]  # [columns, rows, side, side]
    return ids.reshape(rows * columns, side * side)


def offsets_from_thumbnail(
    rows: int, columns: int, side: int, thumbnail: Thumbnail, tile_order: TileOrder = "row"
) -> Tensor:
    """The ids of all of an image's tokens, thumbnail and tiles in their order, as offsets from the thumbnail's first,
    int64 [M]."""
    own = torch.arange(side * side)
    if rows * columns == 1:
        return own
    tiles = tile_position_ids(rows, columns, side, tile_order).flatten()
    return torch.cat((own, tiles) if thumbnail == "first" else (tiles, own))


def tiles_per_image(tiles: Tiles) -> int:
    """How many tiles an image has, with the thumbnail, which is there unless there is one tile only."""
    count = tiles[0] * tiles[1]
    return count + (count > 1)


def tokens_per_image(tiles: Tiles, side: int) -> int:
    """How many visual tokens an image has: its tiles' and its thumbnail's."""
    return tiles_per_image(tiles) * side * side


def position_ids(
    visual_token_mask: Tensor,
    attention_mask: Tensor | None,
    tile_grids: Tensor,
    side: int,
    thumbnail: Thumbnail,
    tile_order: TileOrder = "row",
) -> Tensor:
    """Position ids of a batch of prompts, int64 [B, S].

    visual_token_mask bool [B, S]; attention_mask [B, S], nonzero where there is a token; tile_grids [N, 2]: rows and
    columns of each image, row after row of the batch. Every token but a tile's takes the next id, the thumbnail's
    included; a tile's token takes the id of the thumbnail patch it covers. Padding gets 0.

    Raises ValueError where a row's visual tokens are not those of its images.
    """
    present = torch.ones_like(visual_token_mask) if attention_mask is None else attention_mask.bool()
    grids = iter(_tiles(tile_grids))
    ids = torch.zeros(visual_token_mask.shape, dtype=torch.int64)
    for row, (visual, row_present) in enumerate(zip(visual_token_mask.cpu(), present.cpu(), strict=True)):
        ids[row, row_present] = _row(visual[row_present], grids, side, thumbnail, tile_order, row)
    unused = sum(1 for _ in grids)
    if unused:
        raise ValueError(f"{len(tile_grids)} tile grids were given, {unused} more than the prompts have images for")
    return ids.to(visual_token_mask.device)


def thumbnail_mask(visual_token_mask: Tensor, tile_grids: Tensor, side: int, thumbnail: Thumbnail) -> Tensor:
    """Which visual tokens are a thumbnail's (an image of one tile is its own), bool [B, S]. Arguments and errors are
    those of `position_ids`."""
    grids = iter(_tiles(tile_grids))
    mask = visual_token_mask.cpu().clone()
    for row, visual in enumerate(mask):
        for image in _images(visual.clone(), grids, side, thumbnail, row):
            visual[image.parts] = False
    return mask.to(visual_token_mask.device)


class _Image(NamedTuple):
    """Where an image's tokens are in its row. An image of one tile has no parts."""

    tiles: Tiles
    thumbnail: Tensor
    parts: Tensor


def _tiles(tile_grids: Tensor) -> list[Tiles]:
    return [(int(rows), int(columns)) for rows, columns in tile_grids.tolist()]


def _images(visual: Tensor, grids: Iterator[Tiles], side: int, thumbnail: Thumbnail, row: int) -> Iterator[_Image]:
    """The images of one row, visual bool [S]; takes their grids off `grids`."""
    places = visual.nonzero().flatten()
    while len(places):
        tiles = next(grids, None)
        if tiles is None:
            raise ValueError(f"row {row} has visual tokens for more images than there are tile grids")
        count = tokens_per_image(tiles, side)
        if len(places) < count:
            raise ValueError(
                f"row {row} has {len(places)} visual tokens left for an image of {tiles[0]} x {tiles[1]} tiles, "
                f"which takes {count}: grid and tiles do not match"
            )
        own, places = places[:count], places[count:]
        split = side * side if thumbnail == "first" else count - side * side
        before, after = own[:split], own[split:]
        yield _Image(tiles, before, after) if thumbnail == "first" else _Image(tiles, after, before)


def _row(
    visual: Tensor, grids: Iterator[Tiles], side: int, thumbnail: Thumbnail, tile_order: TileOrder, row: int
) -> Tensor:
    """The ids of one row without padding, int64 [S]; takes its images' grids off `grids`."""
    # A token's id is its anchor's and an offset: tiles are anchored at their thumbnail, every other token at itself
    own_index = torch.arange(len(visual))
    anchor, offset = own_index.clone(), torch.zeros_like(own_index)
    for image in _images(visual, grids, side, thumbnail, row):
        if len(image.parts):
            anchor[image.parts] = image.thumbnail[0]
            offset[image.parts] = tile_position_ids(*image.tiles, side, tile_order).flatten()
    counted = (anchor == own_index).cumsum(0) - 1
    return counted[anchor] + offset
