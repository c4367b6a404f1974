"""The drawing of position ids: what it shows, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from checkpoints import has_tokenizer, tiny_checkpoint
from patching import apply
from surgeon.errors import InputError
from surgeon.families import family
from surgeon.models import read_config
from surgeon.positions_image import TilePositions, draw_positions

PUBLISHED = {
    "model_type": "surgeon_internvl",
    "surgeon": {
        "grafts": [],
        "passes": [],
        "layout": {"side": 16, "thumbnail": "last"},
        "positions": {"scheme": "rope_dhr", "tile_order": "row"},
    },
}


def test_tiles_are_laid_out_as_the_image() -> None:
    """In row order a tile's ids are those of the thumbnail stretched over the tiles."""
    config = read_config(PUBLISHED)
    positions = TilePositions.of(family("internvl"), config, 2, 3)
    assert positions.thumbnail.tolist() == np.arange(256).reshape(16, 16).tolist()
    stretched = positions.thumbnail[np.arange(32) // 2][:, (2 * np.arange(48) + 1) // 6]
    assert np.array_equal(positions.tiles, stretched)
    assert (positions.ids, positions.plain_ids) == (256, 7 * 256)
    plain = TilePositions.of(family("internvl"), config, 2, 3, "plain")
    assert plain.ids == plain.plain_ids == 7 * 256
    one = TilePositions.of(family("internvl"), config, 1, 1)
    assert one.ids == 256 and np.array_equal(one.tiles, one.thumbnail)


@pytest.mark.skipif(not has_tokenizer(), reason="the demo checkpoint is not there")
def test_a_drawing(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "internvl")
    apply(source, tmp_path / "patched", "rope-dhr")
    image = Image.new("RGB", (130, 90), "teal")
    description = draw_positions(tmp_path / "patched", image, tmp_path / "out.png").describe()
    assert description == "2 x 3 tiles and a thumbnail: 63 visual tokens on 9 position ids (RoPE-DHR)"
    drawn = np.asarray(Image.open(tmp_path / "out.png").convert("RGB"))
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 9
    assert "as many position ids" in draw_positions(source, image, tmp_path / "plain.png").describe()
    with pytest.raises(InputError, match=r"choose a name that ends in"):
        draw_positions(source, image, tmp_path / "out.xyz")
    with pytest.raises(InputError, match="cannot write"):
        draw_positions(source, image, tmp_path / "nowhere" / "out.png")


@pytest.mark.skipif(not has_tokenizer(), reason="the demo checkpoint is not there")
def test_families_without_tiles_are_refused(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl")
    with pytest.raises(InputError, match="qwen3_vl does not cut images into tiles"):
        draw_positions(source, Image.new("RGB", (64, 64)), tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()
