"""Ovis2: the thumbnail, then tiles with separators; a ViT whose patches become mixtures of a visual vocabulary."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from surgeon import ops
from surgeon.errors import FamilyError
from surgeon.families._base import Grid, TileLayout, VisionExport, token_of
from surgeon.families._short_former import ThumbnailShortFormer, example_queries, with_adapters
from surgeon.families._tiled import TiledFamily
from surgeon.families._vision import image_attention, tiles_export
from surgeon.memory.short_former import ShortFormer
from surgeon.memory.towers.ovis2 import Ovis2Tower
from surgeon.sizes import Size, Sizes, SquareTowerSizes, TokenId


class Ovis2Sizes(Sizes):
    image_token_id: TokenId
    visual_indicator_token_ids: Annotated[Sequence[TokenId], Field(min_length=5, max_length=5)]


class Ovis2VisionSizes(SquareTowerSizes):
    hidden_stride: Size
    vocab_size: Size
    num_visual_indicator_tokens: Literal[5]


class Ovis2(TiledFamily):
    model_type = "ovis2"
    norm_placement = "pre_norm"
    tower = Ovis2Tower
    model_class = "Ovis2ForConditionalGeneration"
    config_class = "Ovis2Config"
    config_sizes = Ovis2Sizes
    vision_sizes = Ovis2VisionSizes
    vision_tower = "model.vision_tower"
    projector = "model.visual_embeddings_table"
    image_processor_class = "Ovis2ImageProcessor"

    def tile_size(self, config: PretrainedConfig) -> tuple[int, int]:
        side = self.vision_config(config).image_size
        return side, side

    def tile_layout(self, config: PretrainedConfig) -> TileLayout:
        vision = self.vision_config(config)
        patches = vision.image_size // vision.patch_size
        if patches % vision.hidden_stride:
            raise FamilyError(
                f"tiles of {patches} x {patches} patches are not divisible by hidden_stride {vision.hidden_stride}: "
                "transformers' Ovis2 does not take them either"
            )
        return TileLayout(side=patches // vision.hidden_stride, thumbnail="first")

    def tile_limits(self, min_tiles: int | None, max_tiles: int | None) -> Mapping[str, int]:
        if min_tiles is not None:
            raise FamilyError("Ovis2's image processor chooses a grid by its most tiles alone; leave min_tiles out")
        return super().tile_limits(min_tiles, max_tiles)

    def tile_grid(self, image_processor: Any, image: Image.Image, processed: Mapping[str, Any]) -> tuple[int, int]:
        rows, columns = processed["grids"][0].tolist()
        return rows, columns

    def indicator_token_ids(self, config: PretrainedConfig) -> tuple[int, ...]:
        """The start of an image, of its tiles, the end of a tile, of a row of tiles, and of the image."""
        return tuple(config.visual_indicator_token_ids)

    def placeholder(self, config: PretrainedConfig, tokenizer: Any) -> str:
        return "<image>"

    def expand_placeholder(self, config: PretrainedConfig, grid: Grid, tokenizer: Any) -> str:
        """The thumbnail's image tokens, then each tile's, with the indicators around and between them."""
        start, tiles, column, row, end = (token_of(tokenizer, each) for each in self.indicator_token_ids(config))
        tile = token_of(tokenizer, self.image_token_id(config)) * self.tile_layout(config).side ** 2
        _, rows, columns = grid
        cut = row.join([column.join([tile] * columns)] * rows) if rows * columns > 1 else ""
        return f"{start}{tile}{tiles}{cut}{end}"

    def vision_export(self, model: PreTrainedModel, dtype: torch.dtype) -> VisionExport:
        """Raises FamilyError for a visual vocabulary that is drawn from at random."""
        self._check_words(model.config)
        table: Any = model.get_submodule(self.projector)
        module = Ovis2Vision(self.vision_model(model, dtype), table)
        return tiles_export(model, module, self.tile_size(model.config), dtype, ("features", "indicators"))

    def short_former_export(
        self, model: PreTrainedModel, former: ShortFormer, num_queries: int, dtype: torch.dtype
    ) -> VisionExport:
        """Raises FamilyError as `vision_export`."""
        self._check_words(model.config)
        view = with_adapters(model, former, dtype)
        module = ThumbnailShortFormer(
            Ovis2Vision(self.vision_model(view, dtype), view.get_submodule(self.projector)), former
        )
        queries = example_queries(former, num_queries)
        return tiles_export(model, module, self.tile_size(model.config), dtype, ("latents",), queries=queries)

    def _check_words(self, config: Any) -> None:
        if config.vision_config.tokenize_function not in ("softmax", "st_argmax"):
            raise FamilyError(
                f"tokenize_function {config.vision_config.tokenize_function!r} cannot be exported: it is random; "
                "supported: softmax, st_argmax"
            )
        self.tile_layout(config)


class Ovis2Vision(nn.Module):
    """Ovis2's vision tower over one image's tiles, and its table of visual embeddings."""

    def __init__(self, tower: Any, table: Any) -> None:
        super().__init__()
        vision, embeddings = tower.config, tower.transformer.embeddings
        self.patch_embedding, self.patch_norm = embeddings.patch_embedding, embeddings.rms_norm
        self.position_embedding = embeddings.position_embedding
        self.layers, self.norm = tower.transformer.encoder.layers, tower.transformer.rms_norm
        self.head_linear, self.head_norm, self.table = tower.head_linear, tower.head_norm, table
        self.num_heads, self.scale = vision.num_attention_heads, self.layers[0].attention.scale
        self.patches = vision.image_size // vision.patch_size
        self.stride, self.indicators = vision.hidden_stride, vision.num_visual_indicator_tokens
        self.hard = vision.tokenize_function == "st_argmax"

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """pixel_values [T, 3, H, W] -> features [T * n, d], n = patches² / stride² of each tile, and the embeddings
        of the indicator tokens [K, d], the same for every image."""
        x = self.embed(pixel_values)
        _, length, width = x.shape
        # Patches as rows [T * patches², d] where they are treated one by one, so that a linear layer is one Gemm
        x = self.run_blocks(x.reshape(-1, width), length)
        words = self.score(self.merge(rms_norm(self.norm, x)))
        return self.look_up(words), self.table.weight.narrow(0, words.shape[1], self.indicators)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Each tile's patches, [T, patches², d]."""
        x = rms_norm(self.patch_norm, self.patch_embedding(pixel_values).flatten(2).transpose(1, 2))
        return x + self.position_embedding.weight

    def run_blocks(self, x: Tensor, length: int | None) -> Tensor:
        """x [T * length, d], each tile for itself; with None all rows are one sequence."""
        for layer in self.layers:
            attn, h = layer.attention, rms_norm(layer.rms_norm1, x)
            q, k, v = attn.q_proj(h), attn.k_proj(h), attn.v_proj(h)
            x = x + attn.out_proj(image_attention(q, k, v, length, self.num_heads, self.scale))
            ffn, h = layer.ffn, rms_norm(layer.rms_norm2, x)
            x = x + ffn.down_proj(ffn.act_fn(ffn.gate_proj(h)) * ffn.up_proj(h))
        return x

    def project_slots(self, x: Tensor) -> Tensor:
        """Slots out of the last block, those of a vector one after the other: [N * stride², d] -> features [N, d]."""
        return self.look_up(self.score(rms_norm(self.norm, x).reshape(-1, self.stride**2 * x.shape[1])))

    def score(self, x: Tensor) -> Tensor:
        """Merged patches [N, stride² * d] -> scores of the visual words [N, V]."""
        words: Tensor = self.head_norm(self.head_linear(x))
        return words

    def merge(self, x: Tensor) -> Tensor:
        """Each stride x stride block of patches as one row, row by row: [T * patches², d] -> [T * n, stride² * d]."""
        blocks = self.patches // self.stride
        x = x.reshape(-1, blocks, self.stride, blocks, self.stride, x.shape[1])
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, self.stride**2 * x.shape[5])

    def look_up(self, words: Tensor) -> Tensor:
        """Scores of the visual words [N, V] -> embeddings [N, d]: the best word's, or all in proportion."""
        if self.hard:
            best: Tensor = self.table.weight.index_select(0, words.argmax(-1))
            return best
        # the table's last rows are the indicators', which no patch has a share of
        shares = nn.functional.pad(words.softmax(-1), (0, self.indicators))
        return shares @ self.table.weight


def rms_norm(module: Any, x: Tensor) -> Tensor:
    return ops.rms_norm(x, module.weight, module.variance_epsilon)


FAMILY = Ovis2()
