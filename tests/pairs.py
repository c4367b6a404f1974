"""A tiny checkpoint in torch beside its bundle, for tests that compare the two."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from surgeon import models
from surgeon.inputs import Inputs, ModelInputs, Side

MAX_LENGTH = 192
Row = list[str | Image.Image]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@dataclass(frozen=True)
class Pair:
    """A checkpoint and its bundle."""

    checkpoint: Path
    bundle: Path

    @cached_property
    def model(self) -> Any:
        model = models.load(self.checkpoint, dtype=torch.float32)
        # without an end token every row goes on for as long as it is asked to
        model.generation_config = GenerationConfig(pad_token_id=0)
        return model

    @cached_property
    def inputs(self) -> Inputs:
        return Inputs.from_directory(self.checkpoint)

    def raw(self, rows: list[Row], side: Side = "right") -> ModelInputs:
        """Rows of text and pictures as they are, without a chat template around them."""
        token = self.inputs.image_token
        pictures = [[self.inputs.picture(part) for part in row if not isinstance(part, str)] for row in rows]
        ids = [
            self.inputs.tokenize("".join(p if isinstance(p, str) else token for p in row), [grid for _, grid in found])
            for row, found in zip(rows, pictures, strict=True)
        ]
        length = max(map(len, ids))
        input_ids, mask = np.zeros((2, len(rows), length), dtype=np.int64)
        for i, row_ids in enumerate(ids):
            where = slice(len(row_ids)) if side == "right" else slice(length - len(row_ids), None)
            input_ids[i, where], mask[i, where] = row_ids, 1
        images = (input_ids == self.inputs.family.image_token_id(self.inputs.config)).astype(np.int64)
        return ModelInputs(
            self.inputs.family,
            input_ids,
            mask,
            images,
            [[pixels for pixels, _ in found] for found in pictures],
            [[grid for _, grid in found] for found in pictures],
        )

    @torch.no_grad()
    def greedy(self, inputs: ModelInputs, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """transformers' tokens [B, steps] and logits [B, steps, V]; `inputs` are padded on the left."""
        found = self.model.generate(
            **inputs.model_kwargs(),
            max_new_tokens=steps,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = np.stack([step.numpy() for step in found.logits], axis=1)
        return found.sequences[:, -steps:].numpy(), logits


def open_gates(checkpoint: Path) -> None:
    """Grafts as after training: gates open, matrices of a size that makes attention choose."""
    (path,) = checkpoint.glob("*pvm*.safetensors")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.full_like(t, 0.8) if name.endswith("alpha") else t + torch.randn(t.shape, generator=generator) * 0.2
        for name, t in load_file(path).items()
    }
    path.unlink()  # never write into a file that may share its bytes
    save_file(tensors, path, {"format": "pt"})
