"""Patched tiny models and inputs for them, for tests."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

import passes
from checkpoints import TOKEN_IDS, tiny_model
from surgeon import models
from surgeon.memory.graft import Graft
from surgeon.patch import PatchReport, patch
from surgeon.recipe import Recipe

IMAGE = TOKEN_IDS["image_token_id"]
LAYERS = (1, 3)


def apply(source: Path, target: Path, *arguments: str, seed: int = 0, **options: object) -> PatchReport:
    """`surgeon patch SOURCE TARGET --pass ...` from Python."""
    recipe_passes = Recipe.from_arguments(arguments, seed).make_passes(passes.registry())
    return patch(source, target, recipe_passes, seed=seed, **options)  # type: ignore[arg-type]


def patched_pair(
    directory: Path, model_type: str, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A tiny model and the same with PVM at `LAYERS`, just inserted."""
    source, target = directory / "source", directory / "patched"
    tiny_model(model_type, dtype).save_pretrained(source)
    apply(source, target, "pvm:layers=1,3,latent=32")
    return models.load(source), models.load(target)


def open_gates(model: PreTrainedModel, alpha: float = 0.8) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("pvm.alpha"):
                parameter.fill_(alpha)


def image(grid: tuple[int, int, int]) -> list[int]:
    """An image's tokens: start, placeholders, end."""
    count = grid[0] * grid[1] * grid[2] // 4
    return [TOKEN_IDS["vision_start_token_id"], *[IMAGE] * count, TOKEN_IDS["vision_end_token_id"]]


def batch(
    model: PreTrainedModel,
    rows: list[list[int]],
    grids: list[tuple[int, int, int]],
    padding_side: str = "left",
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Model keywords for rows of token ids whose images, row after row, have these grids."""
    length = max(map(len, rows))
    pad = [[0] * (length - len(row)) for row in rows]
    left = padding_side == "left"
    ids = torch.tensor([p + r if left else r + p for p, r in zip(pad, rows, strict=True)])
    mask = torch.tensor(
        [[0] * len(p) + [1] * len(r) if left else [1] * len(r) + [0] * len(p) for p, r in zip(pad, rows, strict=True)]
    )
    kwargs = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == IMAGE).long()}
    if grids:
        vision = model.config.vision_config
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        patches = sum(t * h * w for t, h, w in grids)
        pixels = torch.randn(patches, width, generator=torch.Generator().manual_seed(seed))
        kwargs |= {"pixel_values": pixels.to(model.dtype), "image_grid_thw": torch.tensor(grids)}
    return kwargs


def randomise_grafts(model: PreTrainedModel, seed: int = 0) -> None:
    """Every graft as if it had been trained: open gates, no norm that is all ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, module in model.named_modules():
            if not isinstance(module, Graft):
                continue
            for name, parameter in module.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if name in module.gates:
                    noise = 0.6 + noise.abs() * 0.2
                elif parameter.ndim == 1:
                    noise = 1 + noise * 0.2
                else:
                    noise = noise / parameter.shape[1] ** 0.5
                parameter.copy_(noise)
