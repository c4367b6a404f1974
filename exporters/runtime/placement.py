"""Where an image's visual tokens go: into the sequence, into the memory, or both, and at which positions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PretrainedConfig

from surgeon.families import Grid
from surgeon.memory.rope_dhr import Thumbnail, TileOrder, offsets_from_thumbnail
from surgeon.positions import record_of


@dataclass(frozen=True)
class ImageFeatures:
    """An image as the decoder gets it: features fp32 [M, d], and where the family has them deepstack fp32 [K, M, d],
    and indicators fp32 [K, d], the embeddings of the tokens around and between its tiles."""

    features: np.ndarray
    deepstack: np.ndarray | None = None
    indicators: np.ndarray | None = None


@dataclass(frozen=True)
class MemoryInputs:
    """What enters a row's memory: embeds fp32 [M, d], position_ids int64 [A, M], and places int64 [M]: where in the
    row's sequence, counted from its first token, each of them stands."""

    embeds: np.ndarray
    position_ids: np.ndarray
    places: np.ndarray


def padded(rows: Sequence[MemoryInputs | None]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Embeds [B, M, d], position_ids [A, B, M] and places [B, M], padded with zeros to the longest row, and bool
    [B, M]: what is not padding. None: a row that nothing enters; there is one that something does."""
    lengths = np.array([0 if row is None else len(row.embeds) for row in rows])
    some = next(row for row in rows if row is not None)
    embeds = np.zeros((len(rows), lengths.max(), some.embeds.shape[1]), dtype=np.float32)
    position_ids = np.zeros((len(some.position_ids), *embeds.shape[:2]), dtype=np.int64)
    places = np.zeros(embeds.shape[:2], dtype=np.int64)
    for index, row in enumerate(rows):
        if row is not None:
            own = slice(lengths[index])
            embeds[index, own], position_ids[:, index, own] = row.embeds, row.position_ids
            places[index, own] = row.places
    return embeds, position_ids, places, np.arange(lengths.max()) < lengths[:, None]


class Placement:
    """By what a bundle's config records of tiles; without it every visual token is in the sequence and the memory."""

    def __init__(self, config: PretrainedConfig) -> None:
        record = record_of(config)
        layout = record.get("layout", {})
        self.allocation: str = record.get("allocation", "both")
        self.side: int = layout.get("side", 0)
        self.thumbnail: Thumbnail = layout.get("thumbnail", "last")
        self.tile_order: TileOrder = record.get("positions", {}).get("tile_order", "row")

    def in_sequence(self, image: ImageFeatures) -> ImageFeatures:
        """What of an image stands in the sequence: all, or where tiles go to the memory alone its thumbnail."""
        if self.allocation != "memory":
            return image
        assert image.deepstack is None
        return replace(image, features=image.features[self._thumbnail])

    def entering(
        self, images: Sequence[ImageFeatures], grids: Sequence[Grid], position_ids: np.ndarray, places: np.ndarray
    ) -> MemoryInputs | None:
        """What of a row's images enters the memory. position_ids int64 [A, n] and places int64 [n]: of what of them
        stands in the sequence."""
        if not images:
            return None
        ends = np.cumsum([len(self.in_sequence(image).features) for image in images])[:-1]
        per_image = zip(images, grids, np.split(position_ids, ends, 1), np.split(places, ends), strict=True)
        parts = [self._entering(*arguments) for arguments in per_image]
        return MemoryInputs(
            np.concatenate([part.embeds for part in parts]),
            np.concatenate([part.position_ids for part in parts], axis=1),
            np.concatenate([part.places for part in parts]),
        )

    def _entering(self, image: ImageFeatures, grid: Grid, position_ids: np.ndarray, places: np.ndarray) -> MemoryInputs:
        """Of one image."""
        if self.allocation == "context":
            part = self._thumbnail
            return MemoryInputs(image.features[part], position_ids[:, part], places[part])
        if self.allocation == "memory":
            # a tile's token is where the patch is that it covers, having no place of its own in the sequence
            _, rows, columns = grid
            offsets = offsets_from_thumbnail(rows, columns, self.side, self.thumbnail, self.tile_order).numpy()
            position_ids, places = position_ids[:, :1] + offsets, places[:1] + offsets
        return MemoryInputs(image.features, position_ids, places)

    @property
    def _thumbnail(self) -> slice:
        """Where it is among an image's tokens; a single tile is its own."""
        count = self.side**2
        return slice(count) if self.thumbnail == "first" else slice(-count, None)
