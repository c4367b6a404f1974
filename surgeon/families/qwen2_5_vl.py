"""Qwen2.5-VL: multimodal RoPE in sections, a vision tower of windowed and full attention."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from surgeon import ops
from surgeon.errors import CheckpointError
from surgeon.families import _qwen_host as host
from surgeon.families._base import Grid, VisionExport
from surgeon.families._qwen_vl import QwenVision, QwenVisionSizes, QwenVLFamily, unturned_behind
from surgeon.families._short_former import ShortFormerVision, concatenated, example_queries, with_adapters
from surgeon.memory.short_former import ShortFormer
from surgeon.memory.towers.qwen2_5_vl import Qwen25VLTower
from surgeon.sizes import Size, check_indexes


class Qwen25VisionSizes(QwenVisionSizes):
    window_size: Size
    fullatt_block_indexes: Sequence[int]

    @model_validator(mode="after")
    def _validate_sizes(self) -> Self:
        if self.window_size < self.patch_size * self.spatial_merge_size:
            raise ValueError(f"window_size {self.window_size} is less than a block of merged patches")
        check_indexes("fullatt_block_indexes", self.fullatt_block_indexes, self.depth)
        return self


class Qwen25VL(QwenVLFamily):
    model_type = "qwen2_5_vl"
    norm_placement = "pre_norm"
    tower = Qwen25VLTower
    model_class = "Qwen2_5_VLForConditionalGeneration"
    config_class = "Qwen2_5_VLConfig"
    vision_sizes = Qwen25VisionSizes

    def check_sizes(self, config: PretrainedConfig) -> None:
        super().check_sizes(config)
        num_frequencies, expected = len(self.rope_axes(config)), self.head_dim(config) // 2
        if num_frequencies != expected:
            raise CheckpointError(
                f"config.json: text_config.rope_parameters.mrope_section is of {num_frequencies} frequencies, and half "
                f"a head of {expected}"
            )

    def rope_axes(self, config: PretrainedConfig) -> Sequence[int]:
        """One section of frequencies after the other: time, height, width."""
        sections = self.text_config(config).rope_parameters.get("mrope_section", [16, 24, 24])
        return [i % 3 for i, length in enumerate(sections) for _ in range(length)]

    def vision_inputs(self, config: PretrainedConfig, pixel_values: np.ndarray, grid: Grid) -> dict[str, np.ndarray]:
        """pixel_values [N, C], and in int64: position_ids [N, 2], window_index and its inverse [M], window_gather
        [W, L], window_kv_len [W], window_scatter [N].

        Raises InputError for a grid of several frames, or one that does not fit `pixel_values`.
        """
        vision = self.vision_config(config)
        merge = vision.spatial_merge_size
        host.check_grid(grid, merge, len(pixel_values))
        side = vision.window_size // merge // vision.patch_size
        order, lengths = host.window_order(grid, merge, side)
        gather, scatter = host.window_batch(lengths, (side * merge) ** 2)
        return {
            "pixel_values": pixel_values,
            "position_ids": host.patch_positions(grid, merge),
            "window_index": order,
            "window_inverse": np.argsort(order).astype(np.int64),
            "window_gather": gather,
            "window_kv_len": lengths,
            "window_scatter": scatter,
        }

    def vision_export(self, model: PreTrainedModel, dtype: torch.dtype) -> VisionExport:
        visual = self.vision_model(model, dtype)
        merged, windows = torch.export.Dim("M"), torch.export.Dim("W")
        patches = visual.config.spatial_merge_size**2 * merged
        return self.finish_export(
            model,
            Qwen25Vision(visual, self.rotary_frequencies(model.config)),
            dtype,
            self.example_inputs(model.config),
            {
                "pixel_values": patches,
                "position_ids": patches,
                "window_index": merged,
                "window_inverse": merged,
                "window_gather": windows,
                "window_kv_len": windows,
                "window_scatter": patches,
            },
            ("features",),
        )

    def short_former_inputs(
        self, config: PretrainedConfig, images: Sequence[tuple[np.ndarray, Grid]]
    ) -> dict[str, np.ndarray]:
        """The inputs of `vision_inputs` of every image but the inverse of the window order, their indices counted on
        from image to image. Raises InputError as it does."""
        merge_unit = self.vision_config(config).spatial_merge_size ** 2
        whole, patches, windows = [], 0, 0
        for pixel_values, grid in images:
            inputs = self.vision_inputs(config, pixel_values, grid)
            del inputs["window_inverse"]
            capacity = inputs["window_gather"].shape[1]
            inputs["window_index"] += patches // merge_unit
            inputs["window_gather"] += patches
            inputs["window_scatter"] += windows * capacity
            patches, windows = patches + len(pixel_values), windows + len(inputs["window_gather"])
            whole.append(inputs)
        return concatenated(whole)

    def short_former_export(
        self, model: PreTrainedModel, former: ShortFormer, num_queries: int, dtype: torch.dtype
    ) -> VisionExport:
        visual = self.vision_model(with_adapters(model, former, dtype), dtype)
        merged, windows = torch.export.Dim("M"), torch.export.Dim("W")
        patches = visual.config.spatial_merge_size**2 * merged
        example = self.example_inputs(model.config)
        del example["window_inverse"]
        return self.finish_export(
            model,
            Qwen25ShortFormer(Qwen25Vision(visual, self.rotary_frequencies(model.config)), former),
            dtype,
            example,
            {
                "pixel_values": patches,
                "position_ids": patches,
                "window_index": merged,
                "window_gather": windows,
                "window_kv_len": windows,
                "window_scatter": patches,
            },
            ("latents",),
            queries=example_queries(former, num_queries),
        )


class Qwen25Vision(QwenVision):
    """Qwen2.5-VL's vision tower over one image's patches. It works in window order; only its output is put back."""

    def __init__(self, visual: Any, inv_freq: Tensor) -> None:
        super().__init__(visual, inv_freq)
        self.full_attention_blocks = list(visual.config.fullatt_block_indexes)

    def forward(
        self,
        pixel_values: Tensor,
        position_ids: Tensor,
        window_index: Tensor,
        window_inverse: Tensor,
        window_gather: Tensor,
        window_kv_len: Tensor,
        window_scatter: Tensor,
    ) -> tuple[Tensor]:
        """Inputs as `vision_inputs` names them -> features [M, d]."""
        x = self.in_window_order(F.linear(pixel_values, self.patch_weight, self.patch_bias), window_index)
        cos, sin = self.rotary(self.in_window_order(position_ids, window_index))
        mask = self.window_mask(window_gather, window_kv_len)
        for i, block in enumerate(self.blocks):
            q, k, v = self.qkv(block.attn, self.rms_norm(block.norm1, x), cos, sin)
            if i in self.full_attention_blocks:
                attended = self.attend(q, k, v)[0]
            else:
                attended = self.attend_in_windows(q, k, v, mask, window_gather, window_scatter)
            x = self.after_attention(block, x, attended)
        return (self.project_slots(x).index_select(0, window_inverse),)

    def window_mask(self, window_gather: Tensor, window_kv_len: Tensor) -> Tensor:
        """Which patches of its row a window has, bool [W, 1, L, L]."""
        windows, capacity = window_gather.shape
        # the mask is as high as the queries are long: ONNX Runtime does not broadcast it there
        slots = torch.arange(capacity, device=window_gather.device).reshape(1, 1, 1, capacity)
        return (slots < window_kv_len.reshape(windows, 1, 1, 1)).expand(windows, 1, capacity, capacity)

    def attend_in_windows(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, window_gather: Tensor, window_scatter: Tensor
    ) -> Tensor:
        """Attention within each window of the patches, which come first in q, k, v [1, S, d] -> [N, d]."""
        windows, capacity = window_gather.shape
        q, k, v = (self.in_windows(t, window_gather) for t in (q, k, v))
        return self.attend(q, k, v, mask).reshape(windows * capacity, -1).index_select(0, window_scatter)

    def after_attention(self, block: Any, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of a block."""
        x = x + block.attn.proj(attended)
        h = self.rms_norm(block.norm2, x)
        output: Tensor = x + block.mlp.down_proj(block.mlp.act_fn(block.mlp.gate_proj(h)) * block.mlp.up_proj(h))
        return output

    def project_slots(self, x: Tensor) -> Tensor:
        """Patches, or slots in their place, out of the last block -> features: [N, d] -> [M, d]."""
        h = self.rms_norm(self.merger.ln_q, x).reshape(-1, self.merge_unit * x.shape[1])
        features: Tensor = self.merger.mlp(h)
        return features

    def in_window_order(self, x: Tensor, window_index: Tensor) -> Tensor:
        """Blocks of patches [N, c] put in the order of `window_index` [M]."""
        blocks = x.reshape(-1, self.merge_unit, x.shape[1])
        return blocks.index_select(0, window_index).reshape(-1, x.shape[1])

    def in_windows(self, x: Tensor, window_gather: Tensor) -> Tensor:
        """Patches in window order [1, N, d] as a batch of windows [W, L, d]."""
        windows, capacity = window_gather.shape
        return x[0].index_select(0, window_gather.reshape(-1)).reshape(windows, capacity, x.shape[2])

    def rms_norm(self, norm: Any, x: Tensor) -> Tensor:
        return ops.rms_norm(x, norm.weight, norm.variance_epsilon)


class Qwen25ShortFormer(ShortFormerVision):
    """Qwen2.5-VL's short former over the patches of one request's images."""

    def forward(
        self,
        queries: Tensor,
        pixel_values: Tensor,
        position_ids: Tensor,
        window_index: Tensor,
        window_gather: Tensor,
        window_kv_len: Tensor,
        window_scatter: Tensor,
    ) -> tuple[Tensor]:
        """queries [1, K, d], the images' inputs as `short_former_inputs` names them -> latents [1, N, d]."""
        vision, behind = self.vision, self.behind(queries)
        patches = F.linear(pixel_values, vision.patch_weight, vision.patch_bias)
        x = torch.cat((vision.in_window_order(patches, window_index), behind))
        position_ids = vision.in_window_order(position_ids, window_index)
        cos, sin = vision.rotary(unturned_behind(position_ids, len(behind)))
        mask = vision.window_mask(window_gather, window_kv_len)
        for i, block in enumerate(vision.blocks):
            q, k, v = vision.qkv(block.attn, vision.rms_norm(block.norm1, x), cos, sin)
            if i in vision.full_attention_blocks:
                attended = vision.attend(q, k, v)[0]
            else:
                within = vision.attend_in_windows(q, k, v, mask, window_gather, window_scatter)
                apart = vision.attend(*(t[:, -len(behind) :] for t in (q, k, v)))[0]
                attended = torch.cat((within, apart))
            x = vision.after_attention(block, x, attended)
        return self.latents(x)


FAMILY = Qwen25VL()
