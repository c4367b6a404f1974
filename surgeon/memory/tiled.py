"""A request's tiles: what a caller says of them, turned into tensors that are aligned with the rows of the batch.

A caller passes `tile_grids`, int64 [N, 2], rows and columns of each image's tiles, and may say `positions="plain"`.
What the decoder takes instead follows rows when rows are repeated or reordered: position ids, and what enters the
memory.
"""

from typing import Any

import torch
from torch import Tensor

from surgeon.memory.rope_dhr import TileOrder, offsets_from_thumbnail, thumbnail_mask, tiles_per_image
from surgeon.memory.rope_dhr import position_ids as compressed_position_ids

ROW_ALIGNED = ("memory_token_mask", "memory_embeds", "memory_embeds_mask", "memory_position_ids", "memory_places")
"""The keywords that `resolve_tiles` makes for the decoder, beside `position_ids`."""
IMAGES = ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")


def has_images(kwargs: dict[str, Any]) -> bool:
    """Whether a call brings images. `generate` passes outputs of encoders that had nothing to encode, too."""
    image_inputs = [kwargs.get(name) for name in IMAGES]
    return any(any(v is not None for v in x.values()) if isinstance(x, dict) else x is not None for x in image_inputs)


def resolve_tiles(model: Any, record: dict[str, Any], visual: Tensor | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a call with images, `visual` bool [B, S] its visual tokens; None for a call without.

    Raises ValueError where the model needs `tile_grids` and they are missing or do not match the images.
    """
    kwargs = dict(kwargs)
    tile_grids, positions = kwargs.pop("tile_grids", None), kwargs.pop("positions", None)
    if positions not in (None, "dhr", "plain"):
        raise ValueError(f"positions={positions!r}: choose 'dhr' or 'plain'")
    layout, scheme = record.get("layout"), record.get("positions")
    resolved = any(kwargs.get(name) is not None for name in ROW_ALIGNED)
    if layout is None or visual is None or resolved:
        return kwargs
    compress = scheme is not None and positions != "plain" and kwargs.get("position_ids") is None
    allocation = record.get("allocation", "both")
    if tile_grids is None:
        if compress or allocation != "both":
            hint = ", or positions='plain'" if compress and allocation == "both" else ""
            raise ValueError(
                "this model places tiles by their grid: pass tile_grids, the rows and columns of each image's tiles "
                f"[N, 2]{hint}"
            )
        return kwargs
    if allocation == "memory":
        order: TileOrder = "row" if scheme is None else scheme["tile_order"]
        return _into_memory_alone(model, layout, order, visual, tile_grids, kwargs)
    if (
        compress and scheme is not None and not bool((tile_grids == 1).all())
    ):  # an image of one tile has the positions it had
        mask = kwargs.get("attention_mask")
        kwargs["position_ids"] = compressed_position_ids(
            visual, mask, tile_grids, layout["side"], layout["thumbnail"], scheme["tile_order"]
        )
    if allocation == "context":
        kwargs["memory_token_mask"] = thumbnail_mask(visual, tile_grids, layout["side"], layout["thumbnail"])
    return kwargs


def _into_memory_alone(
    model: Any,
    layout: dict[str, Any],
    tile_order: TileOrder,
    visual: Tensor,
    tile_grids: Tensor,
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """The sequence has the thumbnails alone, and keeps its own positions; tiles and thumbnails enter the memory, a
    tile's token at the position of the patch it covers."""
    side = layout["side"]
    pixel_values = kwargs["pixel_values"]
    counts = [tiles_per_image((rows, columns)) for rows, columns in tile_grids.tolist()]
    if sum(counts) != len(pixel_values):
        raise ValueError(f"tile_grids ask for {sum(counts)} tiles, pixel_values has {len(pixel_values)}")
    if int(visual.sum()) != len(counts) * side * side:
        raise ValueError(
            f"the prompts have {int(visual.sum())} visual tokens for {len(counts)} image(s); a model whose tiles go "
            f"to the memory alone takes {side * side} for each, the thumbnail's"
        )
    features = model.get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output
    images = features.flatten(0, 1).split([count * side * side for count in counts])
    first = layout["thumbnail"] == "first"
    thumbnails = [pixels[:1] if first else pixels[-1:] for pixels in pixel_values.split(counts)]

    offsets = [
        offsets_from_thumbnail(rows, columns, side, layout["thumbnail"], tile_order)
        for rows, columns in tile_grids.tolist()
    ]

    def from_first_token(values: Tensor) -> list[Tensor]:
        """For each image the values [B, S] at the patches that its tokens cover, which go up by one."""
        starts = values[visual].view(-1, side * side)[:, 0].tolist()
        return [start + own for start, own in zip(starts, offsets, strict=True)]

    positions_of = from_first_token(_plain_positions(visual, kwargs.get("attention_mask")))
    places_of = from_first_token(torch.arange(visual.shape[1], device=visual.device).expand(visual.shape))

    per_row = (visual.sum(1) // (side * side)).tolist()
    lengths = [sum(map(len, own)) for own in _split(positions_of, per_row)]
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).to(visual.device)
    embeds = torch.zeros((*mask.shape, features.shape[-1]), dtype=features.dtype, device=features.device)
    positions = torch.zeros(mask.shape, dtype=torch.int64, device=visual.device)
    places = torch.zeros_like(positions)
    embeds[mask] = torch.cat(images)
    positions[mask] = torch.cat(positions_of).to(visual.device)
    places[mask] = torch.cat(places_of).to(visual.device)
    return {
        **kwargs,
        "pixel_values": torch.cat(thumbnails),
        "memory_embeds": embeds,
        "memory_embeds_mask": mask,
        "memory_position_ids": positions,
        "memory_places": places,
    }


def _split(items: list[Tensor], counts: list[int]) -> list[list[Tensor]]:
    chunks, start = [], 0
    for count in counts:
        chunks.append(items[start : start + count])
        start += count
    return chunks


def _plain_positions(visual: Tensor, attention_mask: Tensor | None) -> Tensor:
    present = torch.ones_like(visual) if attention_mask is None else attention_mask.bool()
    return (present.long().cumsum(1) - 1).clamp(min=0)
