"""The rule and the example of docs/bundle.md, written again from its words as another runtime would."""

import json
import math
import re
from pathlib import Path

import torch

from surgeon.memory.rope_dhr import position_ids

TEXT = (Path(__file__).parents[2] / "docs" / "bundle.md").read_text()


def image(t: int, rows: int, columns: int, side: int, tile_order: str) -> list[int]:
    """The ids of an image's tokens, thumbnail last."""
    ids = []
    for n in range(rows * columns) if rows * columns > 1 else ():
        r, c = (n // columns, n % columns) if tile_order == "row" else (n % rows, n // rows)
        for j in range(side):
            for i in range(side):
                if tile_order == "row":
                    y, x = (2 * (r * side + j) + 1) // (2 * rows), (2 * (c * side + i) + 1) // (2 * columns)
                else:
                    h, w = side / rows - 0.000001, side / columns - 0.000001
                    y, x = math.floor(r * h + j * h / (side - 1)), math.floor(c * w + i * w / (side - 1))
                ids.append(t + side * y + x)
    return ids + list(range(t, t + side * side))


def test_the_rule_in_words_is_the_rule_in_code() -> None:
    for side in (2, 3, 16):
        for rows, columns in ((r, c) for r in range(1, 7) for c in range(1, 13) if r * c <= 12):
            for tile_order in ("row", "column"):
                ids = [0, 1, *image(2, rows, columns, side, tile_order)]
                end = 2 + side * side
                ids += [end, end + 1]
                visual = torch.tensor([[False, False, *[True] * (len(ids) - 4), False, False]])
                positions = position_ids(visual, None, torch.tensor([[rows, columns]]), side, "last", tile_order)
                assert positions.tolist() == [ids]


def test_the_example() -> None:
    described = json.loads("{" + re.search(r"```json\n(.*?)```", TEXT, re.DOTALL)[1] + "}")
    assert described["layout"]["thumbnail"] == "last" and described["positions"]["tile_order"] == "row"
    lines = [line for line in TEXT.splitlines() if re.match(r"\| .*\| \d[\d, ]* \|", line)]
    *rows, generated = [[int(n) for n in line.split("|")[2].split(",")] for line in lines]
    tokens = [id for row in rows for id in row]
    visual = torch.tensor([[False] * 2 + [True] * 12 + [False] * 2])
    positions = position_ids(visual, None, torch.tensor([[1, 2]]), 2, "last", "row")
    assert positions.tolist() == [tokens] and generated == [int(positions.max()) + 1]
