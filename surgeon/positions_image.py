"""A drawing of where an image's tokens stand: its tiles and its thumbnail, coloured by position id."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import PretrainedConfig

from surgeon.errors import InputError
from surgeon.families import Family
from surgeon.images import ImageSource, load_image
from surgeon.inputs import Inputs
from surgeon.positions import Positions, choose_positions, position_ids, record_of


@dataclass(frozen=True)
class TilePositions:
    """An image's position ids, counted from its first: `tiles` int64 [rows * side, columns * side], laid out as the
    image; `thumbnail` int64 [side, side]; and how many ids it takes, here and with plain positions."""

    rows: int
    columns: int
    tiles: np.ndarray
    thumbnail: np.ndarray
    ids: int
    plain_ids: int
    positions: Positions

    @classmethod
    def of(
        cls, family: Family, config: PretrainedConfig, rows: int, columns: int, positions: Positions | None = None
    ) -> "TilePositions":
        """Raises InputError for a family that does not cut images into tiles beside a thumbnail."""
        layout = family.tile_layout(config)
        if layout is None:
            raise InputError(
                f"family {family.model_type} does not cut images into tiles beside a thumbnail: nothing to draw"
            )
        used_positions = choose_positions(config, positions) or "plain"
        grid, side = (1, rows, columns), layout.side
        count = layout.tiles(grid) * side * side
        tokens = np.full((1, count), family.image_token_id(config))
        present = np.ones_like(tokens)
        ids, end = position_ids(family, config, tokens, present, [[grid]], used_positions)
        own = ids[0, 0].reshape(-1, side, side)
        if rows * columns == 1:
            thumbnail, tiles = own[0], own
        else:
            thumbnail, tiles = (own[0], own[1:]) if layout.thumbnail == "first" else (own[-1], own[:-1])
        laid_out = tiles.reshape(rows, columns, side, side).transpose(0, 2, 1, 3).reshape(rows * side, columns * side)
        return cls(rows, columns, laid_out, thumbnail, int(end[0]), count, used_positions)

    def describe(self) -> str:
        """In a line."""
        tiles = f"{self.rows} x {self.columns} tiles" + (" and a thumbnail" if self.rows * self.columns > 1 else "")
        if self.positions == "plain":
            return f"{tiles}: {self.plain_ids:,} visual tokens on as many position ids (plain positions)"
        return f"{tiles}: {self.plain_ids:,} visual tokens on {self.ids:,} position ids (RoPE-DHR)"


def draw_positions(
    checkpoint: Path, source: ImageSource, out: Path, positions: Positions | None = None
) -> TilePositions:
    """Draw an image's tiles and thumbnail, coloured by position id, to the file `out`.

    Raises InputError for an image or a file type that cannot be used, and for a family without tiles.
    """
    inputs = Inputs.from_directory(checkpoint)
    if record_of(inputs.config).get("allocation") == "memory":
        raise InputError(
            "tiles of this checkpoint go to the memory alone: the sequence has thumbnails, nothing to draw"
        )
    image = load_image(source)
    if inputs.family.tile_layout(inputs.config) is None:
        TilePositions.of(inputs.family, inputs.config, 1, 1)  # which says why not
    _, (_, rows, columns) = inputs.process_image(source)
    tile_positions = TilePositions.of(inputs.family, inputs.config, rows, columns, positions)
    _draw(tile_positions, image.convert("RGB"), out)
    return tile_positions


def _draw(tile_positions: TilePositions, image: Image.Image, out: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    file_types = canvas.get_supported_filetypes()
    if out.suffix.removeprefix(".").lower() not in file_types:
        raise InputError(f"cannot write {out}: choose a name that ends in .{', .'.join(sorted(file_types))}")
    side = len(tile_positions.thumbnail)
    whole, tiles, thumbnail = figure.subplots(1, 3)
    stretched = image.resize((tile_positions.columns * 224, tile_positions.rows * 224))
    whole.imshow(stretched, extent=(0, tile_positions.columns, tile_positions.rows, 0))
    whole.set_title(f"the image as it is cut, {tile_positions.rows} x {tile_positions.columns}")
    limits = {"vmin": 0, "vmax": tile_positions.ids - 1, "cmap": "viridis"}
    drawn = tiles.imshow(tile_positions.tiles, extent=(0, tile_positions.columns, tile_positions.rows, 0), **limits)
    tiles.set_title(f"position ids of the tiles, {side} x {side} tokens each")
    thumbnail.imshow(tile_positions.thumbnail, extent=(0, 1, 1, 0), **limits)
    thumbnail.set_title("position ids of the thumbnail")
    for axes in (whole, tiles, thumbnail):
        axes.set_xticks([])
        axes.set_yticks([])
    for axes in (whole, tiles):
        for row in range(1, tile_positions.rows):
            axes.axhline(row, color="white", linewidth=1.5)
        for column in range(1, tile_positions.columns):
            axes.axvline(column, color="white", linewidth=1.5)
    figure.colorbar(drawn, ax=[tiles, thumbnail], label="position id, from the image's first")
    figure.suptitle(tile_positions.describe())
    try:
        figure.savefig(out, dpi=110)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from None
