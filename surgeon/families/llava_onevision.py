"""LLaVA-OneVision: a lone image is seen whole and in tiles, whose features are put together, without their padding,
row by row; one of several is seen whole only."""

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.image_processing_utils import select_best_resolution

from surgeon.errors import FamilyError, InputError
from surgeon.families._base import Grid, VisionExport, call_image_processor
from surgeon.families._plain import PlainPositionsFamily, check_image_processor_class
from surgeon.families._short_former import ThumbnailShortFormer, example_queries, with_adapters
from surgeon.families._vision import finish_export, image_attention, tiles_export
from surgeon.memory.short_former import ShortFormer
from surgeon.memory.towers.llava_onevision import LlavaOnevisionTower
from surgeon.sizes import Pinpoints, Sizes, SquareTowerSizes, TileSize, TokenId, check


class LlavaOnevisionSizes(Sizes):
    image_token_id: TokenId
    video_token_id: TokenId
    image_grid_pinpoints: Pinpoints
    vision_aspect_ratio: str


class LlavaOnevisionImageProcessorSizes(Sizes):
    size: TileSize
    image_grid_pinpoints: Pinpoints


class TileCountSizes(Sizes):
    size: TileSize | None = None
    image_grid_pinpoints: Pinpoints | None = None


class LlavaOnevision(PlainPositionsFamily):
    """An image's grid is (crops, height, width): how many crops the vision tower sees of it (1: the whole; more:
    the whole and its tiles), and its size in pixels."""

    model_type = "llava_onevision"
    norm_placement = "pre_norm"
    tower = LlavaOnevisionTower
    model_class = "LlavaOnevisionForConditionalGeneration"
    config_class = "LlavaOnevisionConfig"
    config_sizes = LlavaOnevisionSizes
    vision_sizes = SquareTowerSizes
    image_processor_sizes = LlavaOnevisionImageProcessorSizes
    vision_tower = "model.vision_tower"
    projector = "model.multi_modal_projector"
    visual_token_keys = ("image_token_id", "video_token_id")

    def most_tiles(self, image_processor: Mapping[str, Any]) -> int | None:
        settings = check(TileCountSizes, image_processor, file="preprocessor_config.json")
        if settings.size is None or not settings.image_grid_pinpoints:
            return None
        largest = max(height * width for height, width in settings.image_grid_pinpoints)
        return largest // (settings.size.height * settings.size.width) + 1

    def side(self, config: PretrainedConfig) -> int:
        """Patches, and features, along a side of each crop that the vision tower sees."""
        vision = self.vision_config(config)
        return int(vision.image_size // vision.patch_size)

    def tiles(self, config: PretrainedConfig, grid: Grid) -> tuple[int, int]:
        """Rows and columns of tiles that a lone image of this grid's size is cut into."""
        resolution = select_best_resolution(list(grid[1:]), config.image_grid_pinpoints)
        rows, columns = (math.ceil(size / self.vision_config(config).image_size) for size in resolution)
        return rows, columns

    def image_tokens(self, config: PretrainedConfig, grid: Grid) -> int:
        """The whole image's, and either a line break, or those of its tiles, with a line break after each row."""
        side = self.side(config)
        if grid[0] == 1:
            return side * side + 1
        _, (rows, columns) = self.feature_map(config, grid)
        return side * side + rows * (columns + 1)

    def feature_map(self, config: PretrainedConfig, grid: Grid) -> tuple[tuple[slice, slice], tuple[int, int]]:
        """Of the features of a lone image's tiles put together: which rows and columns are not padding, and how many
        rows and columns they are scaled to. Arithmetic, roundings included, as in transformers."""
        _, height, width = grid
        side = self.side(config)
        rows, columns = (tiles * side for tiles in self.tiles(config, grid))
        top = left = 0
        if width / height > columns / rows:
            top = (rows - int(round(height * (columns / width), 7))) // 2
        else:
            left = (columns - int(round(width * (rows / height), 7))) // 2
        inside = slice(top, rows - top), slice(left, columns - left)
        rows, columns = rows - 2 * top, columns - 2 * left
        ratio = math.sqrt(rows * columns / (self.max_tiles(config) * side**2))
        return inside, (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)

    def max_tiles(self, config: PretrainedConfig) -> int:
        """How many tiles' worth of features an image has at most. Raises FamilyError where the config does not say."""
        number = config.vision_aspect_ratio.removeprefix("anyres_max_")
        if not number.isdigit() or config.vision_feature_select_strategy != "full":
            raise FamilyError(
                f"vision_aspect_ratio {config.vision_aspect_ratio!r} with vision_feature_select_strategy "
                f"{config.vision_feature_select_strategy!r} is not supported; supported: 'anyres_max_N' with 'full'"
            )
        return int(number)

    # -- images and prompts ------------------------------------------------------------------------------------
    def check_image_processor(self, config: PretrainedConfig, image_processor: Any) -> None:
        check_image_processor_class(image_processor, "LlavaOnevisionImageProcessor")
        super().check_image_processor(config, image_processor)

    def process_image(
        self, config: PretrainedConfig, image_processor: Any, image: Image.Image, alone: bool = True
    ) -> tuple[np.ndarray, Grid]:
        """-> fp32 [T, 3, H, W]: the image whole, then, where it is alone, its tiles; and its grid."""
        # a second image beside it, which is dropped, has it treated as one of several
        beside = [] if alone else [Image.new("RGB", (1, 1))]
        processed = call_image_processor(image_processor, [[image, *beside]])
        pixel_values: np.ndarray = processed["pixel_values"][0].numpy()
        height, width = processed["image_sizes"][0].tolist()
        grid = (len(pixel_values), height, width)
        self.check_crops(config, pixel_values, grid)
        return pixel_values, grid

    def check_crops(self, config: PretrainedConfig, pixel_values: np.ndarray, grid: Grid) -> None:
        """Raises InputError unless `pixel_values` [T, 3, H, W] are the crops that stand for an image of `grid`."""
        rows, columns = self.tiles(config, grid)
        size = self.vision_config(config).image_size
        if len(pixel_values) != grid[0] or grid[0] not in (1, 1 + rows * columns):
            raise InputError(
                f"an image of {grid[1]} x {grid[2]} pixels was given as {len(pixel_values)} crop(s), expected "
                f"{1 + rows * columns}, or 1 among others: image_grid_pinpoints of preprocessor_config.json and "
                "config.json should agree"
            )
        if pixel_values.shape[2:] != (size, size):
            raise InputError(
                f"crops are {pixel_values.shape[2]} x {pixel_values.shape[3]} pixels, the vision tower takes "
                f"{size} x {size}: set size in preprocessor_config.json to that"
            )

    def model_kwargs(
        self, pixel_values: Sequence[Sequence[np.ndarray]], grids: Sequence[Sequence[Grid]]
    ) -> Mapping[str, np.ndarray]:
        """pixel_values [N, T, 3, H, W], zeros behind an image's last; image_sizes [N, 2]; batch_num_images: how many
        images each row with any has."""
        images = list(chain.from_iterable(pixel_values))
        longest = max(map(len, images))
        return {
            "pixel_values": np.stack([np.pad(p, ((0, longest - len(p)), *[(0, 0)] * 3)) for p in images]),
            "image_sizes": np.array([grid[1:] for grid in chain.from_iterable(grids)], dtype=np.int64),
            "batch_num_images": np.array([len(row) for row in grids if row], dtype=np.int64),
        }

    # -- vision export -----------------------------------------------------------------------------------------
    def vision_inputs(self, config: PretrainedConfig, pixel_values: np.ndarray, grid: Grid) -> dict[str, np.ndarray]:
        """pixel_values [T, 3, H, W], feature_index int64 and feature_weight fp32 [M, 4]: each visual token as a mixture
        of four features, or of the line break behind them, index T * side². Raises InputError as `check_crops`."""
        self.check_crops(config, pixel_values, grid)
        side, crops = self.side(config), grid[0]
        line_break = crops * side * side
        whole = np.arange(side * side)
        if crops == 1:
            index, weight = _unscaled(np.append(whole, line_break))
        else:
            tiles = np.arange(side * side, line_break).reshape(*self.tiles(config, grid), side, side)
            inside, scaled = self.feature_map(config, grid)
            features = tiles.transpose(0, 2, 1, 3).reshape(tiles.shape[0] * side, -1)[inside]
            index, weight = _unscaled(features) if features.shape == scaled else _bilinear(features, scaled)
            ends, one = _unscaled(np.full((scaled[0], 1), line_break))
            index, weight = np.concatenate((index, ends), 1), np.concatenate((weight, one), 1)
            first, ones = _unscaled(whole)
            index = np.concatenate((first, index.reshape(-1, 4)))
            weight = np.concatenate((ones, weight.reshape(-1, 4)))
        return {"pixel_values": pixel_values, "feature_index": index, "feature_weight": weight}

    def vision_export(self, model: PreTrainedModel, dtype: torch.dtype) -> VisionExport:
        """Raises FamilyError for a vision tower other than SigLIP, and for features of several of its layers."""
        config: Any = model.config
        module = self._vision(model, dtype)
        size, tokens = config.vision_config.image_size, torch.export.Dim("M")
        example = {
            "pixel_values": torch.zeros(3, 3, size, size, dtype=dtype),
            "feature_index": torch.zeros(7, 4, dtype=torch.int64),
            "feature_weight": torch.zeros(7, 4),
        }
        dynamic = {"pixel_values": torch.export.Dim("T"), "feature_index": tokens, "feature_weight": tokens}
        return finish_export(model, module, example, dynamic, ("features",))

    def short_former_export(
        self, model: PreTrainedModel, former: ShortFormer, num_queries: int, dtype: torch.dtype
    ) -> VisionExport:
        """Raises FamilyError as `vision_export`."""
        vision = self._vision(with_adapters(model, former, dtype), dtype)
        module, size = ThumbnailShortFormer(vision, former), self.vision_config(model.config).image_size
        queries = example_queries(former, num_queries)
        return tiles_export(model, module, (size, size), dtype, ("latents",), queries=queries)

    def short_former_inputs(
        self, config: PretrainedConfig, images: Sequence[tuple[np.ndarray, Grid]]
    ) -> dict[str, np.ndarray]:
        """pixel_values [n, 3, H, W], of each image the view of the whole. Raises InputError as `check_crops`."""
        for pixel_values, grid in images:
            self.check_crops(config, pixel_values, grid)
        return {"pixel_values": np.concatenate([pixel_values[:1] for pixel_values, _ in images])}

    def _vision(self, model: Any, dtype: torch.dtype) -> "LlavaOnevisionVision":
        config = model.config
        tower, layer = self.vision_model(model, dtype), config.vision_feature_layer
        if config.vision_config.model_type != "siglip_vision_model" or not isinstance(layer, int):
            raise FamilyError(
                f"vision tower {config.vision_config.model_type!r} with vision_feature_layer {layer} cannot be "
                "exported; supported: siglip_vision_model and one layer"
            )
        newline = model.get_parameter("model.image_newline")
        return LlavaOnevisionVision(tower, model.get_submodule(self.projector), newline, layer)


def _unscaled(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mixtures [..., 4] of one feature each: indices int64, weights fp32."""
    index = np.repeat(features[..., None].astype(np.int64), 4, axis=-1)
    weight = np.zeros(index.shape, dtype=np.float32)
    weight[..., 0] = 1
    return index, weight


def _bilinear(features: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A map of feature indices [h, w] scaled to `size` as torch does (bilinear, corners not aligned): mixtures
    [*size, 4] of indices int64 and weights fp32."""
    low, high, share = [], [], []
    for length, scaled in zip(features.shape, size, strict=True):
        step = np.float32(length) / np.float32(scaled)
        source = np.maximum(step * (np.arange(scaled, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5), 0)
        floor = np.minimum(source.astype(np.int64), length - 1)
        low.append(floor)
        high.append(np.minimum(floor + 1, length - 1))
        share.append(source - floor.astype(np.float32))
    down, right = share[0][:, None].astype(np.float32), share[1][None].astype(np.float32)
    corners = [features[np.ix_(rows, columns)] for rows in (low[0], high[0]) for columns in (low[1], high[1])]
    weights = [(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right]
    return np.stack(corners, -1).astype(np.int64), np.stack(weights, -1).astype(np.float32)


class LlavaOnevisionVision(nn.Module):
    """LLaVA-OneVision's SigLIP and projector over the crops of one image."""

    def __init__(self, tower: Any, projector: Any, image_newline: nn.Parameter, feature_layer: int) -> None:
        super().__init__()
        self.patch_embedding = tower.embeddings.patch_embedding
        self.position_embedding = tower.embeddings.position_embedding
        # 0 is the first layer's input; a negative index counts from the last layer's output
        self.layers = tower.encoder.layers[: feature_layer % (len(tower.encoder.layers) + 1)]
        self.projector, self.image_newline = projector, image_newline
        self.num_heads = tower.config.num_attention_heads
        self.scale = float((tower.config.hidden_size // self.num_heads) ** -0.5)

    def forward(self, pixel_values: Tensor, feature_index: Tensor, feature_weight: Tensor) -> tuple[Tensor]:
        """Inputs as `vision_inputs` names them -> features [M, d]."""
        x = self.embed(pixel_values)
        # Patches as rows [T * side², d] where they are treated one by one, so that a linear layer is one Gemm
        _, length, width = x.shape
        x = self.project_slots(self.run_blocks(x.reshape(-1, width), length))
        x = torch.cat((x, self.image_newline[None]))
        # one after the other: together they would be four times the size
        shares = (x.index_select(0, feature_index[:, i]).float() * feature_weight[:, i, None] for i in range(4))
        return (reduce(torch.add, shares).to(x.dtype),)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Each crop's patches, [T, side², d]."""
        patches: Tensor = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2) + self.position_embedding.weight
        return patches

    def run_blocks(self, x: Tensor, length: int | None) -> Tensor:
        """x [T * length, d], each crop for itself; with None all rows are one sequence."""
        for layer in self.layers:
            attn, h = layer.self_attn, layer.layer_norm1(x)
            q, k, v = attn.q_proj(h), attn.k_proj(h), attn.v_proj(h)
            x = x + attn.out_proj(image_attention(q, k, v, length, self.num_heads, self.scale))
            x = x + layer.mlp.fc2(layer.mlp.activation_fn(layer.mlp.fc1(layer.layer_norm2(x))))
        return x

    def project_slots(self, x: Tensor) -> Tensor:
        """Patches, or slots in their place, out of the last block -> features, [N, d]."""
        features: Tensor = self.projector.linear_2(self.projector.act(self.projector.linear_1(x)))
        return features


FAMILY = LlavaOnevision()
