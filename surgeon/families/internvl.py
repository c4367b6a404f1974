"""InternVL (2.5 to 3, and converted InternVL2): tiles, then the thumbnail; a ViT with a class token, pixel shuffle."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from surgeon import ops
from surgeon.errors import FamilyError
from surgeon.families._base import Grid, TileLayout, VisionExport
from surgeon.families._short_former import ThumbnailShortFormer, example_queries, with_adapters
from surgeon.families._tiled import TiledFamily
from surgeon.families._vision import image_attention, tiles_export
from surgeon.memory.short_former import ShortFormer
from surgeon.memory.towers.internvl import InternVLTower
from surgeon.sizes import Size, Sizes, TokenId, VisionSizes


class InternVLSizes(Sizes):
    image_token_id: TokenId
    downsample_ratio: Annotated[float, Field(gt=0, le=1)]


class InternVLVisionSizes(VisionSizes):
    num_channels: Literal[3]
    image_size: Annotated[Sequence[Size], Field(min_length=2, max_length=2)]
    patch_size: Annotated[Sequence[Size], Field(min_length=2, max_length=2)]

    @model_validator(mode="after")
    def _whole_patches(self) -> Self:
        if any(image < patch for image, patch in zip(self.image_size, self.patch_size, strict=True)):
            raise ValueError(f"image_size {self.image_size} is less than patch_size {self.patch_size}")
        return self


class InternVL(TiledFamily):
    model_type = "internvl"
    norm_placement = "pre_norm"
    tower = InternVLTower
    model_class = "InternVLForConditionalGeneration"
    config_class = "InternVLConfig"
    video_processor_class = "InternVLVideoProcessor"
    config_sizes = InternVLSizes
    vision_sizes = InternVLVisionSizes
    vision_tower = "model.vision_tower"
    projector = "model.multi_modal_projector"
    image_processor_class = "GotOcr2ImageProcessor"
    processor_kwargs: ClassVar[Mapping[str, Any]] = {"crop_to_patches": True}

    def tile_size(self, config: PretrainedConfig) -> tuple[int, int]:
        height, width = self.vision_config(config).image_size
        return height, width

    def tile_layout(self, config: PretrainedConfig) -> TileLayout:
        vision = self.vision_config(config)
        rows, columns = (size // patch for size, patch in zip(vision.image_size, vision.patch_size, strict=True))
        if rows != columns:
            raise FamilyError(f"tiles of {rows} x {columns} patches are not supported: image_size must be square")
        return TileLayout(side=int(rows * config.downsample_ratio), thumbnail="last")

    def tile_grid(self, image_processor: Any, image: Image.Image, processed: Mapping[str, Any]) -> tuple[int, int]:
        """As the image processor chose it; it does not tell."""
        if image_processor.max_patches <= 1:
            return 1, 1
        columns, rows = get_optimal_tiled_canvas(
            (image.height, image.width),
            (image_processor.size["height"], image_processor.size["width"]),
            image_processor.min_patches,
            image_processor.max_patches,
        )
        return rows, columns

    def expand_placeholder(self, config: PretrainedConfig, grid: Grid, tokenizer: Any) -> str:
        """`<img>`, the image tokens of all tiles and the thumbnail, `</img>`."""
        # a tokenizer that does not say how they are called has their names of every InternVL so far
        start, end = getattr(tokenizer, "start_image_token", "<img>"), getattr(tokenizer, "end_image_token", "</img>")
        return f"{start}{super().expand_placeholder(config, grid, tokenizer)}{end}"

    def vision_export(self, model: PreTrainedModel, dtype: torch.dtype) -> VisionExport:
        """Raises FamilyError for features of several layers at once, or with the class token among them."""
        config: Any = model.config
        self._check_features(config)
        projector = model.get_submodule(self.projector)
        module = InternVLVision(self.vision_model(model, dtype), projector, config)
        return tiles_export(model, module, self.tile_size(config), dtype)

    def short_former_export(
        self, model: PreTrainedModel, former: ShortFormer, num_queries: int, dtype: torch.dtype
    ) -> VisionExport:
        """Raises FamilyError as `vision_export`."""
        self._check_features(model.config)
        view = with_adapters(model, former, dtype)
        vision = InternVLVision(self.vision_model(view, dtype), view.get_submodule(self.projector), model.config)
        queries = example_queries(former, num_queries)
        module, size = ThumbnailShortFormer(vision, former), self.tile_size(model.config)
        return tiles_export(model, module, size, dtype, ("latents",), queries=queries)

    def _check_features(self, config: Any) -> None:
        if not isinstance(config.vision_feature_layer, int) or config.vision_feature_select_strategy != "default":
            raise FamilyError(
                f"vision_feature_layer {config.vision_feature_layer} with vision_feature_select_strategy "
                f"{config.vision_feature_select_strategy!r} cannot be exported: supported are one layer and 'default'"
            )


class InternVLVision(nn.Module):
    """InternVL's vision tower and projector over one image's tiles, made of the modules and parameters of both."""

    def __init__(self, tower: Any, projector: Any, config: Any) -> None:
        super().__init__()
        embeddings, vision = tower.embeddings, config.vision_config
        self.patch_projection = embeddings.patch_embeddings.projection
        self.cls_token, self.position_embeddings = embeddings.cls_token, embeddings.position_embeddings
        # the features are a layer's output: a negative index counts from the last, 0 is the first layer's input
        depth = len(tower.encoder.layer)
        last = config.vision_feature_layer
        self.layers = tower.encoder.layer[: depth if last == -1 else last % (depth + 1)]
        self.norm = tower.layernorm if last == -1 else nn.Identity()
        self.projector = projector
        self.num_heads, self.scale = vision.num_attention_heads, tower.encoder.layer[0].attention.scale
        self.side = vision.image_size[0] // vision.patch_size[0]
        self.merge = int(1 / config.downsample_ratio)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor]:
        """pixel_values [T, 3, H, W] -> features [T * n, d], n = side² / merge² for each tile."""
        x = self.embed(pixel_values)
        _, length, width = x.shape
        # Patches as rows [T * (1 + side²), d] where they are treated one by one, so that a linear layer is one Gemm
        x = self.run_blocks(x.reshape(-1, width), length)
        x = self.norm(x).reshape(-1, length, width).narrow(1, 1, length - 1)
        return (self.project(self.pixel_shuffle(x)),)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Each tile's class token and patches, [T, 1 + side², d]."""
        patches = self.patch_projection(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(patches.shape[0], -1, -1), patches), 1)
        return x if self.position_embeddings is None else x + self.position_embeddings

    def run_blocks(self, x: Tensor, length: int | None) -> Tensor:
        """x [T * length, d], each tile for itself; with None all rows are one sequence."""
        for layer in self.layers:
            x = x + layer.lambda_1 * self.attend(layer.attention, norm(layer.layernorm_before, x), length)
            h = layer.mlp
            x = x + layer.lambda_2 * h.fc2(h.activation_fn(h.fc1(norm(layer.layernorm_after, x))))
        return x

    def attend(self, attn: Any, x: Tensor, length: int | None) -> Tensor:
        """Attention within each tile; x and length as in `run_blocks`."""
        q, k = norm(attn.q_norm, attn.q_proj(x)), norm(attn.k_norm, attn.k_proj(x))
        output: Tensor = attn.projection_layer(
            image_attention(q, k, attn.v_proj(x), length, self.num_heads, self.scale)
        )
        return output

    def pixel_shuffle(self, x: Tensor) -> Tensor:
        """Each merge x merge block of patches as one row, columns of the block first: [T, side², d] -> [T * n, c]."""
        blocks = self.side // self.merge
        x = x.reshape(-1, blocks, self.merge, blocks, self.merge, x.shape[2])
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, self.merge**2 * x.shape[5])

    def project_slots(self, x: Tensor) -> Tensor:
        """Slots out of the last block, those of a vector one after the other: [N * merge², d] -> features [N, d]."""
        return self.project(self.norm(x).reshape(-1, self.merge**2 * x.shape[1]))

    def project(self, x: Tensor) -> Tensor:
        projected: Tensor = self.projector.linear_2(
            self.projector.act(self.projector.linear_1(self.projector.layer_norm(x)))
        )
        return projected


def norm(module: Any, x: Tensor) -> Tensor:
    """LayerNorm and Identity are called; an RMSNorm is one operator."""
    if hasattr(module, "variance_epsilon"):
        return ops.rms_norm(x, module.weight, module.variance_epsilon)
    normed: Tensor = module(x)
    return normed


FAMILY = InternVL()
