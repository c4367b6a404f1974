"""Qwen-VL's towers with vectors behind the patches, against their blocks written out in fp64."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from checkpoints import QWEN_TYPES, tiny_model
from short_formers import one_request, tower_of
from surgeon.families import Grid

GRIDS: tuple[Grid, ...] = ((1, 10, 6), (1, 4, 18), (1, 8, 8))
"""Of 2, 3 and one whole window of 8 x 8 patches."""
NUM_BEHIND = 7


def images_of_grids(model: Any, grids: Sequence[Grid]) -> list[tuple[np.ndarray, Grid]]:
    vision = model.config.vision_config
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    draw = np.random.default_rng(0).standard_normal
    return [(draw((height * columns, width), dtype=np.float32), (1, height, columns)) for _, height, columns in grids]


@pytest.mark.parametrize("grids", [GRIDS[:1], GRIDS[1:], GRIDS])
@pytest.mark.parametrize("model_type", QWEN_TYPES)
def test_encode_against_blocks_in_fp64(model_type: str, grids: Sequence[Grid]) -> None:
    model: Any = tiny_model(model_type)
    _, images = one_request(model, images_of_grids(model, grids))
    behind = torch.randn(NUM_BEHIND, model.config.vision_config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        encoded = tower_of(model_type).encode(model.model, list(model.model.visual.blocks), images, behind)
        expected = written_out(model, images, behind)
    torch.testing.assert_close(encoded.double(), expected, rtol=1e-4, atol=2e-5)


def written_out(model: Any, images: Sequence[Any], behind: Tensor) -> Tensor:
    """The tower's own first inputs, image by image, and then its blocks in fp64 over all of them and `behind`."""
    patches, cos, sin, windows = [], [], [], []
    for image in images:
        inputs = first_inputs(model.model.visual, image)
        patches.append(inputs["hidden_states"].double())
        cos.append(inputs["position_embeddings"][0].double())
        sin.append(inputs["position_embeddings"][1].double())
        windows.extend(torch.diff(inputs["cu_seqlens"]).tolist())
    x = torch.cat((*patches, behind.double()))
    unturned = torch.zeros(len(behind), cos[0].shape[1], dtype=torch.float64)
    turns = torch.cat((*cos, unturned + 1)), torch.cat((*sin, unturned))
    window_of = torch.repeat_interleave(torch.tensor([*windows, len(behind)]))
    same_window = window_of[:, None] == window_of
    full_blocks = getattr(model.model.visual, "fullatt_block_indexes", range(99))
    for index, block in enumerate(model.model.visual.blocks):
        block = block.double()
        mask = torch.ones_like(same_window) if index in full_blocks else same_window
        x = x + attention(block.attn, block.norm1(x), *turns, mask)
        x = x + block.mlp(block.norm2(x))
        block.float()
    return x[-len(behind) :]


def first_inputs(visual: Any, image: Any) -> dict[str, Any]:
    """What the tower's own forward gives its first block, for one image."""
    inputs: dict[str, Any] = {}
    hook = visual.blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: inputs.update(kwargs, hidden_states=args[0]), with_kwargs=True
    )
    visual(image["pixel_values"], grid_thw=image["image_grid_thw"])
    hook.remove()
    return inputs


def attention(attn: Any, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (t.transpose(0, 1) for t in attn.qkv(x).reshape(len(x), 3, attn.num_heads, -1).unbind(1))
    q, k = (t * cos + torch.cat((-t.chunk(2, -1)[1], t.chunk(2, -1)[0]), -1) * sin for t in (q, k))
    scores = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
    output: Tensor = attn.proj((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
    return output


@pytest.mark.parametrize("model_type", QWEN_TYPES)
def test_rows_whose_tokens_are_not_their_images_are_refused(model_type: str) -> None:
    model: Any = tiny_model(model_type)
    kwargs, _ = one_request(model, images_of_grids(model, GRIDS[:2]))
    tower = tower_of(model_type)
    for lengths in ([15, 18, 1], [15, 17], [14, 19], [15], [33, 1], [0, 0]):
        visual = torch.arange(40) < torch.tensor(lengths)[:, None]
        with pytest.raises(ValueError, match=r"images of \[15, 18\] visual tokens do not fit rows that have \["):
            tower.images_by_row(model.model, kwargs, visual)
    visual = torch.arange(40) < torch.tensor([0, 15, 0, 18])[:, None]
    assert [len(images) for images in tower.images_by_row(model.model, kwargs, visual)] == [0, 1, 0, 1]


@pytest.mark.parametrize("model_type", QWEN_TYPES)
def test_videos_are_refused(model_type: str) -> None:
    model: Any = tiny_model(model_type)
    kwargs, _ = one_request(model, images_of_grids(model, GRIDS[:1]))
    kwargs["pixel_values_videos"] = kwargs["pixel_values"]
    with pytest.raises(ValueError, match="videos is not supported"):
        tower_of(model_type).images_by_row(model.model, kwargs, torch.ones(1, 15, dtype=torch.bool))
