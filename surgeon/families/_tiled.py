"""What families share that cut an image into equal tiles, with a thumbnail of the whole beside them."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from PIL import Image
from pydantic import Field, model_validator
from transformers import PretrainedConfig

from surgeon.errors import InputError
from surgeon.families._base import Grid, TileLayout, call_image_processor
from surgeon.families._plain import PlainPositionsFamily, check_image_processor_class
from surgeon.sizes import Size, Sizes, TileSize, check


class TilesSizes(Sizes):
    size: TileSize
    min_patches: Annotated[int, Field(gt=0, le=1024)]
    max_patches: Annotated[int, Field(gt=0, le=1024)]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_patches > self.max_patches:
            raise ValueError(f"min_patches {self.min_patches} is more than max_patches {self.max_patches}")
        return self


class TileCountSizes(Sizes):
    max_patches: Size | None = None


class TiledFamily(PlainPositionsFamily):
    """An image's grid is (1, rows, columns) in tiles; its pixel values are fp32 [T, 3, H, W], its tiles and thumbnail
    in the image processor's order."""

    image_processor_class: ClassVar[str]
    """Name of the transformers image processor, which may have a suffix for the library it computes with."""
    processor_kwargs: ClassVar[Mapping[str, Any]] = {}
    """What the family's transformers processor tells the image processor whatever the latter's settings say."""

    image_processor_sizes: ClassVar[type[Sizes]] = TilesSizes

    def check_image_processor(self, config: PretrainedConfig, image_processor: Any) -> None:
        check_image_processor_class(image_processor, self.image_processor_class)
        super().check_image_processor(config, image_processor)

    def tile_limits(self, min_tiles: int | None, max_tiles: int | None) -> Mapping[str, int]:
        limits = {"min_patches": min_tiles, "max_patches": max_tiles}
        return {setting: tiles for setting, tiles in limits.items() if tiles is not None}

    def most_tiles(self, image_processor: Mapping[str, Any]) -> int | None:
        settings = check(TileCountSizes, image_processor, file="preprocessor_config.json")
        return None if settings.max_patches is None else settings.max_patches + 1

    @abstractmethod
    def tile_layout(self, config: PretrainedConfig) -> TileLayout:
        """Raises FamilyError for tiles whose tokens are not square."""

    @abstractmethod
    def tile_size(self, config: PretrainedConfig) -> tuple[int, int]:
        """Height and width in pixels of the tiles that the vision tower takes."""

    @abstractmethod
    def tile_grid(self, image_processor: Any, image: Image.Image, processed: Mapping[str, Any]) -> tuple[int, int]:
        """Rows and columns of tiles that `image` was cut into; `processed` is what the image processor gave for it."""

    def image_tokens(self, config: PretrainedConfig, grid: Grid) -> int:
        layout = self.tile_layout(config)
        return layout.tiles(grid) * layout.side**2

    def process_image(
        self, config: PretrainedConfig, image_processor: Any, image: Image.Image, alone: bool = True
    ) -> tuple[np.ndarray, Grid]:
        """-> tiles fp32 [T, 3, H, W], and their grid (1, rows, columns)."""
        processed = call_image_processor(image_processor, [image], **self.processor_kwargs)
        pixel_values: np.ndarray = processed["pixel_values"].numpy()
        grid = (1, *self.tile_grid(image_processor, image, processed))
        self.check_tiles(config, pixel_values, grid)
        return pixel_values, grid

    def check_tiles(self, config: PretrainedConfig, pixel_values: np.ndarray, grid: Grid) -> None:
        """Raises InputError unless `pixel_values` [T, 3, H, W] are the tiles and thumbnail of an image of `grid`."""
        frames, rows, columns = grid
        if frames != 1:
            raise InputError(f"grid {tuple(grid)} has {frames} frames: video is not supported yet, pass images")
        expected = self.tile_layout(config).tiles(grid)
        num_tiles = len(pixel_values)
        if num_tiles != expected:
            missing = ", one short: the thumbnail is missing" if num_tiles == rows * columns else ""
            raise InputError(
                f"an image of {rows} x {columns} tiles was given as {num_tiles} tile(s), expected {expected}{missing}"
            )
        size = self.tile_size(config)
        if pixel_values.shape[2:] != size:
            raise InputError(
                f"tiles are {pixel_values.shape[2]} x {pixel_values.shape[3]} pixels, the vision tower takes "
                f"{size[0]} x {size[1]}: set size in preprocessor_config.json to that"
            )

    def model_kwargs(
        self, pixel_values: Sequence[Sequence[np.ndarray]], grids: Sequence[Sequence[Grid]]
    ) -> Mapping[str, np.ndarray]:
        return {"pixel_values": np.concatenate(list(chain.from_iterable(pixel_values)))}

    def vision_inputs(self, config: PretrainedConfig, pixel_values: np.ndarray, grid: Grid) -> dict[str, np.ndarray]:
        """pixel_values [T, 3, H, W]. Raises InputError where they do not fit the grid."""
        self.check_tiles(config, pixel_values, grid)
        return {"pixel_values": pixel_values}

    def short_former_inputs(
        self, config: PretrainedConfig, images: Sequence[tuple[np.ndarray, Grid]]
    ) -> dict[str, np.ndarray]:
        """pixel_values [n, 3, H, W], each image's thumbnail or single tile. Raises InputError as `check_tiles`."""
        for pixel_values, grid in images:
            self.check_tiles(config, pixel_values, grid)
        thumbnail = 0 if self.tile_layout(config).thumbnail == "first" else -1
        return {"pixel_values": np.stack([pixel_values[thumbnail] for pixel_values, _ in images])}
