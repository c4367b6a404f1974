"""What towers share that see tiles of one size: of each image the thumbnail, the view of the whole."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from surgeon.memory.later_turn import visual_runs
from surgeon.memory.rope_dhr import tiles_per_image
from surgeon.memory.towers._base import ImageInputs, Tower
from surgeon.memory.towers._rows import by_row, refuse_videos


class ThumbnailTower(Tower):
    """An image is the pixel values of its thumbnail, or of its single tile: [1, 3, H, W]."""

    block_arguments: ClassVar[tuple[None, ...]] = ()
    """What a block takes behind the hidden states: where it asks for an attention mask, None."""

    @staticmethod
    def width(config: Any) -> int:
        return int(config.vision_config.hidden_size)

    @staticmethod
    def depth(config: Any) -> int:
        return int(config.vision_config.num_hidden_layers)

    @classmethod
    @abstractmethod
    def embed(cls, base_model: Any, pixel_values: Tensor) -> Tensor:
        """pixel_values [n, 3, H, W] -> what enters the first block, [n, L, d_v]."""

    @classmethod
    def encode(
        cls, base_model: Any, blocks: Sequence[nn.Module], images: Sequence[ImageInputs], behind: Tensor
    ) -> Tensor:
        embedded = cls.embed(base_model, torch.cat([image["pixel_values"] for image in images])).flatten(0, 1)
        x = torch.cat((embedded, behind.to(embedded)))[None]
        for block in blocks:
            x = block(x, *cls.block_arguments)
        return x[0, len(embedded) :]


def depth_of_feature_layer(config: Any) -> int:
    """How many blocks `vision_feature_layer` leaves: it counts their outputs, 0 being the first one's input, and a
    negative one from the last. Raises ValueError for features of several layers."""
    layer = config.vision_feature_layer
    if not isinstance(layer, int):
        raise ValueError(f"vision_feature_layer is {layer}: short memory takes features of one layer")
    return int(layer % (config.vision_config.num_hidden_layers + 1))


class TiledTower(ThumbnailTower):
    """Of a family whose tiles are equal and become as many visual tokens each."""

    thumbnail: ClassVar[Literal["first", "last"]]
    """Where the thumbnail stands among its image's tiles."""
    separated_tiles: ClassVar[bool]
    """Whether single tokens stand between the tiles of an image; otherwise its visual tokens are one run."""

    @staticmethod
    @abstractmethod
    def tokens_per_tile(config: Any) -> int:
        """How many visual tokens a tile becomes."""

    @classmethod
    def images_by_row(
        cls, base_model: Any, kwargs: Mapping[str, Any], visual_token_mask: Tensor
    ) -> list[list[ImageInputs]]:
        """Where `tile_grids` does not say how many tiles each image has, its visual tokens do, and an image ends where
        its run of them does: two images without any other token between them would be taken for one.

        Raises ValueError where tiles and visual tokens do not match, or for videos.
        """
        refuse_videos(kwargs)
        pixel_values, grids = kwargs["pixel_values"], kwargs.get("tile_grids")
        per_tile = cls.tokens_per_tile(base_model.config)
        if grids is None:
            tokens = [length for row in visual_token_mask for length in cls._lengths_of_images(row)]
            tiles = [length // per_tile for length in tokens]
        else:
            tiles = [tiles_per_image((rows, columns)) for rows, columns in grids.tolist()]
            # tiles that go to the memory alone leave the thumbnails' tokens in the sequence
            thumbnails_alone = int(visual_token_mask.sum()) == len(tiles) * per_tile
            tokens = [per_tile * (1 if thumbnails_alone else count) for count in tiles]
        if sum(tiles) != len(pixel_values) or any(length % per_tile for length in tokens):
            raise ValueError(
                f"pixel_values has {len(pixel_values)} tiles of {per_tile} visual tokens each, the images have "
                f"{tokens} visual tokens"
            )
        view = slice(0, 1) if cls.thumbnail == "first" else slice(-1, None)
        images = [{"pixel_values": own[view]} for own in pixel_values.split(tiles)]
        return by_row(images, tokens, visual_token_mask)

    @classmethod
    def _lengths_of_images(cls, row: Tensor) -> list[int]:
        """How many visual tokens each image of a row has. row bool [S]."""
        runs = visual_runs(row[None])
        lengths = [length for _, length in runs[:1]]
        for (start, length), (next_start, next_length) in pairwise(runs):
            if cls.separated_tiles and next_start == start + length + 1:
                lengths[-1] += next_length
            else:
                lengths.append(next_length)
        return lengths
