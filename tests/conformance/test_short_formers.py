"""What the short former of every family must do that names a tower; nothing here names one.

A tower is named in the family's file, and made small by the family's case.
"""

import copy
from collections.abc import Callable
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from checkpoints import has_tokenizer, tiny_checkpoint, tiny_model
from short_formers import NUM_LATENTS, WITH_TOWER, one_request, square_images, tiny_former, tiny_queries, tower_of
from surgeon import models
from surgeon.inputs import Inputs, Prompt
from surgeon.memory.lora import SUFFIX, LowRank, linear_layers, low_rank_product
from surgeon.memory.short_former import ShortFormer
from surgeon.memory.towers._thumbnails import ThumbnailTower

every_tower = pytest.mark.parametrize("model_type", WITH_TOWER)
SIDE = 6


def image(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


ROWS = [
    Prompt("What is it?", (image(96, 64, 0),)),
    Prompt("A star is a"),
    Prompt("Compare them.", (image(64, 64, 1), image(130, 60, 2))),
    Prompt("And this?", (image(42, 42, 3),)),
]


# -- what it computes --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@every_tower
def test_copies_of_the_patches_come_out_as_the_patches_do(model_type: str, attention: str) -> None:
    """Each key twice changes no attention, so what stands behind is encoded and projected as the tower itself does it
    with the patches; without rotary positions, which only patches have."""
    model: Any = tiny_model(model_type)
    model.set_attn_implementation(attention)
    for module in model.model.modules():
        if "Vision" in type(module).__name__ and hasattr(module, "inv_freq"):
            module.inv_freq.zero_()
    tower = tower_of(model_type)
    kwargs, images = one_request(model, square_images(model, SIDE, SIDE))
    entering, leaving, features = through_the_tower(model, kwargs)
    blocks = list(model.model.get_submodule(tower.blocks))
    with torch.no_grad():
        encoded = tower.encode(model.model, blocks, images[:1], entering)
    torch.testing.assert_close(encoded, leaving, rtol=1e-5, atol=1e-5)

    patches = leaving[-(isqrt(len(leaving)) ** 2) :]  # without a class token
    if issubclass(tower, ThumbnailTower):
        patches = block_by_block(patches, isqrt(tower.slots_per_vector(model.config)))
    with torch.no_grad():
        projected = tower.project(model.model, patches)
    assert len(projected) == len(patches) // tower.slots_per_vector(model.config)
    torch.testing.assert_close(projected, features[: len(projected)], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def through_the_tower(model: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """What enters the first block and leaves the last, [L, d_v], and the features [M, d], of the first of two
    images."""
    blocks = model.model.get_submodule(tower_of(model.config.model_type).blocks)
    seen: list[Tensor] = []
    hooks = [
        blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0])),
        blocks[-1].register_forward_hook(lambda module, args, output: seen.append(output)),
    ]
    features = model.model.get_image_features(**kwargs).pooler_output
    for hook in hooks:
        hook.remove()
    features = torch.cat(list(features)) if isinstance(features, list | tuple) else features
    entering, leaving, features = (t.reshape(2, -1, t.shape[-1])[0] for t in (*seen, features))
    return entering, leaving, features


def block_by_block(patches: Tensor, merge: int) -> Tensor:
    """A square of patches, row by row -> each merge x merge block of them, row by row."""
    blocks = isqrt(len(patches)) // merge
    return patches.reshape(blocks, merge, blocks, merge, -1).permute(0, 2, 1, 3, 4).reshape(len(patches), -1)


@every_tower
def test_adapters_are_as_if_merged_into_the_weights(model_type: str) -> None:
    model: Any = tiny_model(model_type)
    former, queries = tiny_former(model), tiny_queries(model)
    _, images = one_request(model, square_images(model, SIDE, 2 * SIDE))
    merged = copy.deepcopy(model)
    blocks = list(merged.model.get_submodule(former.tower.blocks))
    count = 0
    for path, low_rank in former.adapters.named_modules():
        if isinstance(low_rank, LowRank):
            index, _, within = path.removesuffix(SUFFIX).partition(".")
            with torch.no_grad():
                blocks[int(index)].get_submodule(within).weight += low_rank_product(low_rank)
            count += 1
    assert count == len(blocks) * len(former.tower.targets)
    with torch.no_grad():
        latents = former(model.model, images, queries)
        behind = torch.cat((former.query_map(queries), former.memory_init))
        encoded = former.tower.encode(merged.model, blocks, images, behind)
        expected = former.tower.project(merged.model, encoded[len(queries) :])
        plain = former.tower.encode(model.model, list(model.model.get_submodule(former.tower.blocks)), images, behind)
    assert latents.shape == (NUM_LATENTS, queries.shape[1])
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
    assert (encoded - plain).abs().mean() > 0.1


@every_tower
def test_attention_implementations_agree(model_type: str) -> None:
    model: Any = tiny_model(model_type)
    former, queries = tiny_former(model), tiny_queries(model)
    _, images = one_request(model, square_images(model, SIDE, 2 * SIDE))
    latents = []
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            latents.append(former(model.model, images, queries))
    torch.testing.assert_close(*latents, rtol=1e-5, atol=1e-5)


@every_tower
def test_every_image_is_seen(model_type: str) -> None:
    model: Any = tiny_model(model_type)
    former, queries = tiny_former(model), tiny_queries(model)
    first, second, third = square_images(model, SIDE, 2 * SIDE, 4 * SIDE)
    with torch.no_grad():
        latents = [
            former(model.model, one_request(model, images)[1], queries)
            for images in ([first, second], [first, third], [third, second])
        ]
    for other in latents[1:]:
        assert (latents[0] - other).abs().mean() > 1e-3


@every_tower
def test_latents_in_bf16_are_near_those_in_fp32(model_type: str) -> None:
    latents = []
    for dtype in (torch.float32, torch.bfloat16):
        model: Any = tiny_model(model_type, dtype)
        _, images = one_request(model, square_images(model, SIDE))
        with torch.no_grad():
            latents.append(tiny_former(model)(model.model, images, tiny_queries(model)))
    assert latents[1].dtype == torch.bfloat16
    assert (latents[0] - latents[1].float()).abs().mean() < 0.05 * latents[0].std()


# -- what it leaves alone, and what it teaches -------------------------------------------------------------------
@every_tower
def test_the_model_is_as_it_was(model_type: str) -> None:
    model: Any = tiny_model(model_type)
    former, queries = tiny_former(model), tiny_queries(model)
    kwargs, images = one_request(model, square_images(model, SIDE, SIDE))
    *_, before = through_the_tower(model, kwargs)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = {name: (set(vars(module)), set(module._modules)) for name, module in model.named_modules()}
    with torch.no_grad():
        former(model.model, images, queries)
    *_, after = through_the_tower(model, kwargs)
    assert torch.equal(before, after)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert attributes == {name: (set(vars(module)), set(module._modules)) for name, module in model.named_modules()}


@pytest.mark.parametrize("checkpointing", [False, True])
@every_tower
def test_gradients_reach_everything_of_the_former(model_type: str, checkpointing: bool) -> None:
    model: Any = tiny_model(model_type)
    model.requires_grad_(False)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    former, queries = tiny_former(model), tiny_queries(model).requires_grad_()
    _, images = one_request(model, square_images(model, SIDE))
    former(model.model, images, queries).square().sum().backward()
    for name, parameter in (*former.named_parameters(), ("queries", queries)):
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert parameter.grad.abs().max() > 1e-6, name
    assert all(parameter.grad is None for parameter in model.parameters())


@every_tower
def test_targets_that_no_block_has_are_refused(model_type: str) -> None:
    model: Any = tiny_model(model_type)
    tower = tower_of(model_type)
    there = sorted({path for path, _ in linear_layers(model.model.get_submodule(tower.blocks)[0])})
    with pytest.raises(ValueError, match="no linear layer is called nothing; there are ") as error:
        ShortFormer(tower, model.model, NUM_LATENTS, [*tower.targets, "nothing"], rank=4, alpha=4.0)
    assert str(error.value).endswith(", ".join(there)) and set(tower.targets) < set(there)


# -- rows --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def checkpoints(shared: Callable[..., Path]) -> Callable[[str], Path]:
    """A plain checkpoint of a family."""
    return lambda model_type: (
        shared(f"plain {model_type}", lambda path: tiny_checkpoint(path / "source", model_type, num_hidden_layers=3))
        / "source"
    )


@pytest.mark.skipif(not has_tokenizer(), reason="needs the demo checkpoint's tokenizer")
@pytest.mark.parametrize("side", ["left", "right"])
@every_tower
def test_a_row_of_a_batch_is_as_it_is_alone(checkpoints: Callable[[str], Path], model_type: str, side: Any) -> None:
    """Rows with one image, with none, and with two."""
    checkpoint = checkpoints(model_type)
    model: Any = models.load(checkpoint)
    inputs, former, queries = Inputs.from_directory(checkpoint), tiny_former(model), tiny_queries(model)
    rows = images_of(model, inputs, ROWS, side)
    assert [len(images) for images in rows] == [1, 0, 2, 1]
    for prompt, images in zip(ROWS, rows, strict=True):
        alone = images_of(model, inputs, [prompt], side)[0] if prompt.images else []
        assert len(alone) == len(images)
        if images:
            with torch.no_grad():
                batched, expected = (former(model.model, each, queries) for each in (images, alone))
            assert torch.equal(batched, expected)


def images_of(model: Any, inputs: Inputs, prompts: list[Prompt], side: Any) -> list[list[Any]]:
    kwargs = inputs.prepare(prompts, padding_side=side).model_kwargs()
    ids = torch.tensor(inputs.family.visual_token_ids(model.config))
    visual = torch.isin(kwargs["input_ids"], ids)
    rows: list[list[Any]] = tower_of(model.config.model_type).images_by_row(model.model, kwargs, visual)
    storage = kwargs["pixel_values"].untyped_storage().data_ptr()
    assert all(each["pixel_values"].untyped_storage().data_ptr() == storage for images in rows for each in images)
    return rows
