"""Qwen3-VL (dense): interleaved multimodal RoPE, DeepStack, learned and interpolated patch positions."""

import math
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from surgeon.families import _qwen_host as host
from surgeon.families._base import Grid, VisionExport
from surgeon.families._qwen_vl import QwenVision, QwenVisionSizes, QwenVLFamily, unturned_behind
from surgeon.families._short_former import ShortFormerVision, example_queries, with_adapters
from surgeon.memory.short_former import ShortFormer
from surgeon.memory.towers.qwen3_vl import Qwen3VLTower
from surgeon.sizes import Size, check_indexes


class Qwen3VisionSizes(QwenVisionSizes):
    num_position_embeddings: Size
    deepstack_visual_indexes: Sequence[int]

    @model_validator(mode="after")
    def _validate_sizes(self) -> Self:
        if math.isqrt(self.num_position_embeddings) ** 2 != self.num_position_embeddings:
            raise ValueError(f"num_position_embeddings {self.num_position_embeddings} is not a square")
        check_indexes("deepstack_visual_indexes", self.deepstack_visual_indexes, self.depth)
        return self


class Qwen3VL(QwenVLFamily):
    model_type = "qwen3_vl"
    norm_placement = "pre_norm"
    tower = Qwen3VLTower
    model_class = "Qwen3VLForConditionalGeneration"
    config_class = "Qwen3VLConfig"
    vision_sizes = Qwen3VisionSizes

    def deepstack_layers(self, config: PretrainedConfig) -> int:
        return len(self.vision_config(config).deepstack_visual_indexes)

    def rope_axes(self, config: PretrainedConfig) -> Sequence[int]:
        """Time, height, width in turn (THWTHW...) as far as each axis's section reaches; time takes what is left."""
        sections = self.text_config(config).rope_parameters.get("mrope_section", [24, 20, 20])
        axes = np.zeros(self.head_dim(config) // 2, dtype=np.int64)
        for axis in (1, 2):
            axes[axis : sections[axis] * 3 : 3] = axis
        return [int(axis) for axis in axes]

    def vision_inputs(self, config: PretrainedConfig, pixel_values: np.ndarray, grid: Grid) -> dict[str, np.ndarray]:
        """pixel_values [N, C], position_ids int64 [N, 2], pos_index int64 and pos_weight fp32 [N, 4].

        Raises InputError for a grid of several frames, or one that does not fit `pixel_values`.
        """
        vision = self.vision_config(config)
        host.check_grid(grid, vision.spatial_merge_size, len(pixel_values))
        positions = host.patch_positions(grid, vision.spatial_merge_size)
        index, weight = host.interpolation(positions, grid, int(vision.num_position_embeddings**0.5))
        return {"pixel_values": pixel_values, "position_ids": positions, "pos_index": index, "pos_weight": weight}

    def vision_export(self, model: PreTrainedModel, dtype: torch.dtype) -> VisionExport:
        visual = self.vision_model(model, dtype)
        merged = torch.export.Dim("M")
        patches = visual.config.spatial_merge_size**2 * merged
        return self.finish_export(
            model,
            Qwen3Vision(visual, self.rotary_frequencies(model.config)),
            dtype,
            self.example_inputs(model.config),
            dict.fromkeys(("pixel_values", "position_ids", "pos_index", "pos_weight"), patches),
            ("features", "deepstack") if self.deepstack_layers(model.config) else ("features",),
        )

    def short_former_export(
        self, model: PreTrainedModel, former: ShortFormer, num_queries: int, dtype: torch.dtype
    ) -> VisionExport:
        visual = self.vision_model(with_adapters(model, former, dtype), dtype)
        patches = visual.config.spatial_merge_size**2 * torch.export.Dim("M")
        return self.finish_export(
            model,
            Qwen3ShortFormer(Qwen3Vision(visual, self.rotary_frequencies(model.config)), former),
            dtype,
            self.example_inputs(model.config),
            dict.fromkeys(("pixel_values", "position_ids", "pos_index", "pos_weight"), patches),
            ("latents",),
            queries=example_queries(former, num_queries),
        )


class Qwen3Vision(QwenVision):
    """Qwen3-VL's vision tower over one image's patches."""

    def __init__(self, visual: Any, inv_freq: Tensor) -> None:
        super().__init__(visual, inv_freq)
        self.pos_embed = visual.pos_embed
        self.deepstack_mergers = visual.deepstack_merger_list
        self.deepstack_blocks = list(visual.config.deepstack_visual_indexes)

    def forward(
        self, pixel_values: Tensor, position_ids: Tensor, pos_index: Tensor, pos_weight: Tensor
    ) -> tuple[Tensor, ...]:
        """pixel_values [N, C], position_ids int64 [N, 2], pos_index int64 and pos_weight fp32 [N, 4] ->
        features [M, d], deepstack [K, M, d]."""
        x = self.embed(pixel_values, pos_index, pos_weight)
        cos, sin = self.rotary(position_ids)
        deepstack = []
        for i, block in enumerate(self.blocks):
            x = self.run_block(block, x, cos, sin)
            if i in self.deepstack_blocks:
                merger: Any = self.deepstack_mergers[self.deepstack_blocks.index(i)]
                deepstack.append(self.project(merger, merger.norm(self.merge(x))))
        features = self.project_slots(x)
        return (features, torch.stack(deepstack)) if deepstack else (features,)

    def embed(self, pixel_values: Tensor, pos_index: Tensor, pos_weight: Tensor) -> Tensor:
        """Patches with their learned positions, [N, d]."""
        x = F.linear(pixel_values, self.patch_weight, self.patch_bias)
        position = (self.pos_embed(pos_index).float() * pos_weight[:, :, None]).sum(1)
        return x + position.to(x.dtype)

    def run_block(self, block: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(block.attn, block.norm1(x), cos, sin)
        x = x + block.attn.proj(self.attend(q, k, v)[0])
        output: Tensor = x + block.mlp.linear_fc2(block.mlp.act_fn(block.mlp.linear_fc1(block.norm2(x))))
        return output

    def project_slots(self, x: Tensor) -> Tensor:
        """Patches, or slots in their place, out of the last block -> features: [N, d] -> [M, d]."""
        return self.project(self.merger, self.merge(self.merger.norm(x)))

    def merge(self, x: Tensor) -> Tensor:
        """Each block of patches as one row: [N, d] -> [M, merge_unit * d]."""
        return x.reshape(-1, self.merge_unit * x.shape[1])

    def project(self, merger: Any, x: Tensor) -> Tensor:
        projected: Tensor = merger.linear_fc2(merger.act_fn(merger.linear_fc1(x)))
        return projected


class Qwen3ShortFormer(ShortFormerVision):
    """Qwen3-VL's short former over the patches of one request's images."""

    def forward(
        self, queries: Tensor, pixel_values: Tensor, position_ids: Tensor, pos_index: Tensor, pos_weight: Tensor
    ) -> tuple[Tensor]:
        """queries [1, K, d], the images' inputs as `Qwen3Vision` takes them, one after the other -> latents
        [1, N, d]."""
        behind = self.behind(queries)
        x = torch.cat((self.vision.embed(pixel_values, pos_index, pos_weight), behind))
        cos, sin = self.vision.rotary(unturned_behind(position_ids, len(behind)))
        for block in self.vision.blocks:
            x = self.vision.run_block(block, x, cos, sin)
        return self.latents(x)


FAMILY = Qwen3VL()
