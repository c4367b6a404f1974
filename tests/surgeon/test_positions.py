"""Positions of a batch on the host: each row's own, and where it goes on, on whichever side it is padded."""

import numpy as np
import pytest

from checkpoints import TOKEN_IDS, tiny_config
from surgeon.families import Grid, family
from surgeon.positions import Positions, position_ids

IMAGE = TOKEN_IDS["image_token_id"]
ROWS: list[tuple[list[int], list[Grid]]] = [
    ([5, *[IMAGE] * 27, 6], [(1, 1, 2)]),  # two tiles and a thumbnail, 9 tokens each
    ([7, 8, 9], []),
    ([*[IMAGE] * 9, 5, *[IMAGE] * 45], [(1, 1, 1), (1, 2, 2)]),  # which ends with an image
]


@pytest.mark.parametrize("model_type", ["internvl", "ovis2"])
@pytest.mark.parametrize("positions", ["dhr", "plain"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_batch_are_as_each_alone(model_type: str, positions: Positions, side: str) -> None:
    config = tiny_config(model_type)
    model_family = family(model_type)
    layout = model_family.tile_layout(config)
    assert layout is not None
    config.surgeon = {
        "grafts": [],
        "layout": {"side": layout.side, "thumbnail": layout.thumbnail},
        "positions": {"scheme": "rope_dhr", "tile_order": "row"},
    }
    length = max(len(ids) for ids, _ in ROWS)
    input_ids, mask = np.zeros((2, len(ROWS), length), dtype=np.int64)
    where = [slice(length - len(ids), None) if side == "left" else slice(len(ids)) for ids, _ in ROWS]
    for row, (ids, _) in enumerate(ROWS):
        input_ids[row, where[row]], mask[row, where[row]] = ids, 1
    together, ends = position_ids(model_family, config, input_ids, mask, [grids for _, grids in ROWS], positions)
    for row, (ids, grids) in enumerate(ROWS):
        one = np.array([ids])
        alone, end = position_ids(model_family, config, one, np.ones_like(one), [grids], positions)
        np.testing.assert_array_equal(together[:, row, where[row]], alone[:, 0])
        assert ends[row] == end[0] == alone.max() + 1
    assert ends[0] == (2 + 9 if positions == "dhr" else 2 + 27)
