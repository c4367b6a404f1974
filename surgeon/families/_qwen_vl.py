"""What the Qwen-VL families share: token ids, multimodal positions, and the skeleton of the exported vision tower."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from surgeon import ops
from surgeon.errors import CheckpointError, InputError
from surgeon.families import _qwen_host as host
from surgeon.families._base import Family, Grid, VisionExport, call_image_processor, check_rows
from surgeon.families._short_former import concatenated
from surgeon.families._vision import finish_export
from surgeon.sizes import PixelLimits, Size, Sizes, TokenId, VisionSizes, check


class QwenSizes(Sizes):
    image_token_id: TokenId
    video_token_id: TokenId


class QwenRopeSizes(Sizes):
    mrope_section: Annotated[Sequence[Size], Field(min_length=3, max_length=3)] = (16, 24, 24)
    """How many frequencies turn with each axis of positions."""


class QwenVisionSizes(VisionSizes):
    in_channels: Size
    patch_size: Size
    temporal_patch_size: Size
    spatial_merge_size: Size
    out_hidden_size: Size


class QwenImageProcessorSizes(Sizes):
    size: PixelLimits
    patch_size: Size
    temporal_patch_size: Size
    merge_size: Size


class QwenVLFamily(Family):
    """Qwen-VL: three position axes (time, height, width), patches merged in square blocks, one placeholder each."""

    visual_token_keys = ("image_token_id", "video_token_id")
    token_types = True
    config_sizes = QwenSizes
    vision_sizes: ClassVar[type[VisionSizes]] = QwenVisionSizes
    image_processor_sizes = QwenImageProcessorSizes

    def check_sizes(self, config: PretrainedConfig) -> None:
        super().check_sizes(config)
        check(QwenRopeSizes, self.text_config(config).rope_parameters, "text_config.rope_parameters")
        width, expected = self.vision_config(config).out_hidden_size, self.text_config(config).hidden_size
        if width != expected:
            raise CheckpointError(
                f"config.json: vision_config.out_hidden_size is {width}, and the decoder's hidden_size {expected}"
            )

    def check_image_processor(self, config: PretrainedConfig, image_processor: Any) -> None:
        super().check_image_processor(config, image_processor)
        vision = self.vision_config(config)
        for name, expected in (
            ("patch_size", vision.patch_size),
            ("temporal_patch_size", vision.temporal_patch_size),
            ("merge_size", vision.spatial_merge_size),
        ):
            if getattr(image_processor, name) != expected:
                raise CheckpointError(
                    f"preprocessor_config.json: {name} is {getattr(image_processor, name)}, and the vision tower's "
                    f"{expected}; copy it from where the checkpoint was made"
                )

    def position_ids(
        self,
        config: PretrainedConfig,
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        grids: Sequence[Sequence[Grid]],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Raises InputError where a row's image tokens and grids do not match, or where it has video tokens."""
        check_rows(attention_mask, grids)
        merge = self.vision_config(config).spatial_merge_size
        position_ids = np.zeros((3, *input_ids.shape), dtype=np.int64)
        next_position = np.zeros(len(input_ids), dtype=np.int64)
        for row, ids in enumerate(input_ids):
            present = attention_mask[row].astype(bool)
            if (ids[present] == config.video_token_id).any():
                raise InputError(f"prompt row {row} has video tokens: video is not supported yet, use images")
            positions = host.mrope_row(ids[present] == config.image_token_id, grids[row], merge, row)
            position_ids[:, row, present] = positions
            next_position[row] = positions.max() + 1
        return position_ids, next_position

    def image_tokens(self, config: PretrainedConfig, grid: Grid) -> int:
        return int(np.prod(grid)) // self.vision_config(config).spatial_merge_size ** 2

    def process_image(
        self, config: PretrainedConfig, image_processor: Any, image: Image.Image, alone: bool = True
    ) -> tuple[np.ndarray, Grid]:
        """-> patches fp32 [N, C], and the grid of patches."""
        processed = call_image_processor(image_processor, [image])
        frames, height, width = processed["image_grid_thw"][0].tolist()
        return processed["pixel_values"].numpy(), (frames, height, width)

    def model_kwargs(
        self, pixel_values: Sequence[Sequence[np.ndarray]], grids: Sequence[Sequence[Grid]]
    ) -> Mapping[str, np.ndarray]:
        return {
            "pixel_values": np.concatenate(list(chain.from_iterable(pixel_values))),
            "image_grid_thw": np.array(list(chain.from_iterable(grids)), dtype=np.int64),
        }

    def rotary_frequencies(self, config: PretrainedConfig) -> Tensor:
        """The vision tower's rotary frequencies of one axis, fp32 [head_dim / 4], on the CPU; in no checkpoint."""
        vision = self.vision_config(config)
        theta = (getattr(vision, "rope_parameters", None) or {}).get("rope_theta", 10000.0)
        axis = vision.hidden_size // vision.num_heads // 2
        steps = torch.arange(0, axis, 2, dtype=torch.float, device="cpu") / axis
        return 1.0 / (theta**steps)

    def finish_export(
        self,
        model: PreTrainedModel,
        module: nn.Module,
        dtype: torch.dtype,
        inputs: dict[str, np.ndarray],
        dynamic: dict[str, Any],
        outputs: tuple[str, ...],
        **others: Tensor,
    ) -> VisionExport:
        """`module`, a QwenVision or one over it as `vision`, as a VisionExport, with `inputs` as the example and
        `dynamic` naming each input's first size. `others`: examples of what it takes before them, of sizes that do not
        vary."""
        example = {name: torch.from_numpy(value) for name, value in inputs.items()}
        example["pixel_values"] = example["pixel_values"].to(dtype)
        at = "" if isinstance(module, QwenVision) else "vision."
        return finish_export(
            model,
            module,
            {**others, **example},
            dynamic,
            outputs,
            {f"{at}inv_freq": self.rotary_frequencies(model.config)},
            {f"{at}patch_weight": f"{self.vision_tower}.patch_embed.proj.weight"},
        )

    def example_inputs(self, config: PretrainedConfig) -> dict[str, np.ndarray]:
        """`vision_inputs` of an empty image that is large enough to have no size of 1."""
        vision = self.vision_config(config)
        height, width = (n * vision.spatial_merge_size for n in (6, 7))
        patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return self.vision_inputs(config, np.zeros((height * width, patch), dtype=np.float32), (1, height, width))

    def short_former_inputs(
        self, config: PretrainedConfig, images: Sequence[tuple[np.ndarray, Grid]]
    ) -> dict[str, np.ndarray]:
        """The inputs of `vision_inputs` of every image, one after the other. Raises InputError as it does."""
        return concatenated([self.vision_inputs(config, pixel_values, grid) for pixel_values, grid in images])


class QwenVision(nn.Module):
    """The parts of a Qwen-VL vision tower that its generations share, over the modules and parameters of `visual`."""

    inv_freq: Tensor

    def __init__(self, visual: Any, inv_freq: Tensor) -> None:
        super().__init__()
        weight = visual.patch_embed.proj.weight
        # one image's patches are the convolution's whole windows: a Gemm over the same bytes
        self.patch_weight = nn.Parameter(weight.detach().flatten(1), requires_grad=False)
        self.patch_bias = visual.patch_embed.proj.bias
        self.blocks = visual.blocks
        self.merger = visual.merger
        self.merge_unit = visual.config.spatial_merge_size**2
        self.num_heads = visual.config.num_heads
        self.scale = float((visual.config.hidden_size // self.num_heads) ** -0.5)
        self.register_buffer("inv_freq", inv_freq.to(weight.device), persistent=False)

    def rotary(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin fp32 [1, N, head_dim / 2], rows' angles before columns'. position_ids int64 [N, 2]."""
        angles = (position_ids[..., None].float() * self.inv_freq).flatten(1)[None]
        return angles.cos(), angles.sin()

    def qkv(self, attn: Any, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, rotated in fp32, and values, each [1, N, d]. x [N, d]."""
        q, k, v = (t[None] for t in ops.split3(attn.qkv(x)))
        q = ops.rope_packed(q.float(), cos, sin, self.num_heads).to(x.dtype)
        k = ops.rope_packed(k.float(), cos, sin, self.num_heads).to(x.dtype)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return ops.attention_packed(q, k, v, mask, self.num_heads, self.scale)


def unturned_behind(position_ids: Tensor, behind: int) -> Tensor:
    """Patches' positions int64 [N, 2], and those of vectors behind them [N + behind, 2]: 0, which turns by nothing."""
    return torch.cat((position_ids, torch.zeros(behind, 2, dtype=position_ids.dtype, device=position_ids.device)))
