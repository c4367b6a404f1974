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
from surgeon.families._qwen_vl import QwenVision, QwenVisionSizes, QwenVLFamily
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
        windows, capacity = window_gather.shape
        # the mask is as high as the queries are long: ONNX Runtime does not broadcast it there
        slots = torch.arange(capacity, device=x.device).reshape(1, 1, 1, capacity)
        mask = (slots < window_kv_len.reshape(windows, 1, 1, 1)).expand(windows, 1, capacity, capacity)
        for i, block in enumerate(self.blocks):
            q, k, v = self.qkv(block.attn, self.rms_norm(block.norm1, x), cos, sin)
            if i in self.full_attention_blocks:
                attended = self.attend(q, k, v)[0]
            else:
                q, k, v = (self.in_windows(t, window_gather) for t in (q, k, v))
                attended = self.attend(q, k, v, mask).reshape(windows * capacity, -1).index_select(0, window_scatter)
            x = x + block.attn.proj(attended)
            h = self.rms_norm(block.norm2, x)
            x = x + block.mlp.down_proj(block.mlp.act_fn(block.mlp.gate_proj(h)) * block.mlp.up_proj(h))
        h = self.rms_norm(self.merger.ln_q, x).reshape(-1, self.merge_unit * x.shape[1])
        return (self.merger.mlp(h).index_select(0, window_inverse),)

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


FAMILY = Qwen25VL()
