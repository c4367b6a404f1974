"""RoPE-DHR's ids: the published ones, the geometry computed another way, and how they lie in a prompt."""

import json
from fractions import Fraction
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from golden import DATA
from surgeon.memory.rope_dhr import position_ids, thumbnail_mask, tile_position_ids, tokens_per_image

GRIDS = [(rows, columns) for rows in range(1, 13) for columns in range(1, 13) if rows * columns <= 12]


@pytest.mark.parametrize(("grid", "ids"), json.loads((DATA / "rope_dhr_reference.json").read_text())["grids"].items())
def test_published_ids(grid: str, ids: list[int]) -> None:
    columns, rows = map(int, grid.split("x"))
    visual = torch.ones(1, 5 + len(ids), dtype=torch.bool)
    visual[0, :5] = False
    positions = position_ids(visual, None, torch.tensor([[rows, columns]]), 16, "last", "column")
    assert positions[0, 5:].tolist() == ids


@pytest.mark.parametrize("rows_columns", GRIDS, ids=str)
def test_published_arithmetic_for_every_grid(rows_columns: tuple[int, int]) -> None:
    rows, columns = rows_columns
    width, height = 16 / columns - 1e-6, 16 / rows - 1e-6
    expected = [
        [
            int(y) * 16 + int(x)
            for y in np.linspace(r * height, (r + 1) * height, 16)
            for x in np.linspace(c * width, (c + 1) * width, 16)
        ]
        for c in range(columns)
        for r in range(rows)
    ]
    assert tile_position_ids(rows, columns, 16, "column").tolist() == expected


@given(st.sampled_from(GRIDS), st.sampled_from([3, 8, 16]), st.data())
def test_a_tiles_token_has_the_id_of_the_patch_under_its_centre(
    grid: tuple[int, int], side: int, data: st.DataObject
) -> None:
    """By exact fractions of the image, one token at a time."""
    rows, columns = grid
    row, column = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    y, x = data.draw(st.integers(0, side - 1)), data.draw(st.integers(0, side - 1))
    down = (row + Fraction(2 * y + 1, 2 * side)) / rows  # of the image's height
    right = (column + Fraction(2 * x + 1, 2 * side)) / columns
    expected = int(down * side) * side + int(right * side)
    assert int(tile_position_ids(rows, columns, side)[row * columns + column, y * side + x]) == expected


def test_orders_agree_but_for_the_borders() -> None:
    """Column order is the published arithmetic: it differs from the geometry in the order of tiles, and at 16 of the
    assignments along an axis."""
    differing = 0
    for count in range(1, 13):
        geometry = tile_position_ids(1, count, 16, "row")[:, :16]
        differing += int((geometry != tile_position_ids(1, count, 16, "column")[:, :16]).sum())
    assert differing == 16
    two_by_two = tile_position_ids(2, 2, 16, "row")
    assert torch.equal(two_by_two[1] // 16 < 8, torch.ones(256, dtype=torch.bool))  # the upper right tile is above
    assert bool((tile_position_ids(2, 2, 16, "column")[1] // 16 >= 7).all())  # theirs is given the lower left's ids


def prompt(side: int, thumbnail: Literal["first", "last"]) -> tuple[torch.Tensor, torch.Tensor]:
    """Two words, an image of 1 x 2 tiles, a word, an image of one tile, two words; and the grids."""
    parts = [(2, False), (tokens_per_image((1, 2), side), True), (1, False), (side * side, True), (2, False)]
    visual = torch.cat([torch.full((count,), flag) for count, flag in parts])[None]
    return visual, torch.tensor([[1, 2], [1, 1]])


@pytest.mark.parametrize("thumbnail", ["first", "last"])
def test_an_image_costs_its_thumbnails_ids(thumbnail: Literal["first", "last"]) -> None:
    visual, grids = prompt(2, thumbnail)
    ids = position_ids(visual, None, grids, 2, thumbnail)[0].tolist()
    tiles = [2, 2, 4, 4, 3, 3, 5, 5]  # each patch of a 2 x 2 thumbnail under two tokens side by side
    image = [2, 3, 4, 5, *tiles] if thumbnail == "first" else [*tiles, 2, 3, 4, 5]
    assert ids == [0, 1, *image, 6, 7, 8, 9, 10, 11, 12]
    assert thumbnail_mask(visual, grids, 2, thumbnail).sum() == 8


def test_separators_between_tiles_take_ids_of_their_own() -> None:
    visual = torch.tensor([[1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0]]).bool()
    ids = position_ids(visual, None, torch.tensor([[1, 2]]), 2, "first")[0].tolist()
    assert ids == [0, 1, 2, 3, 4, 0, 0, 2, 2, 5, 1, 1, 3, 3, 6]


@pytest.mark.parametrize("left", [True, False])
def test_padding_moves_nothing(left: bool) -> None:
    visual, grids = prompt(2, "last")
    alone = position_ids(visual, None, grids, 2, "last")[0]
    pad, here = torch.zeros(1, 3, dtype=torch.bool), torch.ones_like(visual)
    padded = torch.cat((pad, visual) if left else (visual, pad), 1)
    mask = torch.cat((pad, here) if left else (here, pad), 1)
    both = torch.cat((padded, padded))
    positions = position_ids(both, torch.cat((mask, mask)).long(), torch.cat((grids, grids)), 2, "last")
    for row in positions:
        assert torch.equal(row[3:] if left else row[:-3], alone)


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ([[1, 2]], "more images than there are tile grids"),
        ([[1, 2], [2, 2]], "2 x 2 tiles, which takes 20"),
        ([[1, 2], [1, 1], [1, 1]], "1 more than the prompts have"),
    ],
)
def test_grids_that_do_not_match(grids: list[list[int]], message: str) -> None:
    visual, _ = prompt(2, "last")
    with pytest.raises(ValueError, match=message):
        position_ids(visual, None, torch.tensor(grids), 2, "last")
