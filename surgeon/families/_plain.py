"""What families share whose decoder is a plain language model: one axis of positions, one after the other."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from surgeon.errors import CheckpointError, FamilyError, InputError
from surgeon.families._base import Family, Grid, check_rows

TEXT_MODELS = ("llama", "qwen2", "qwen3")
"""The text models whose decoder layers read as `pre_norm`."""


class PlainPositionsFamily(Family):
    """A vision tower and projector in front of a language model that may be of several types."""

    def text_config(self, config: PretrainedConfig) -> Any:
        """Raises FamilyError for a text model of a type whose layers are not known."""
        text_model_type = config.text_config.model_type
        if text_model_type not in TEXT_MODELS:
            raise FamilyError(
                f"{self.model_type} with text model {text_model_type!r} is not supported; supported: "
                + ", ".join(TEXT_MODELS)
            )
        return config.text_config

    def rope_axes(self, config: PretrainedConfig) -> Sequence[int]:
        return [0] * (self.head_dim(config) // 2)

    def position_ids(
        self,
        config: PretrainedConfig,
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        grids: Sequence[Sequence[Grid]],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Each row's tokens are numbered from 0. Raises InputError where its image tokens and grids do not match."""
        check_rows(attention_mask, grids)
        present = attention_mask.astype(bool)
        images = (input_ids == self.image_token_id(config)) & present
        for row, row_grids in enumerate(grids):
            expected = sum(self.image_tokens(config, grid) for grid in row_grids)
            num_image_tokens = int(images[row].sum())
            if num_image_tokens != expected:
                raise InputError(
                    f"prompt row {row} has {num_image_tokens} image token(s), "
                    f"its {len(row_grids)} image(s) become {expected}"
                )
        following = present.sum(1).astype(np.int64)
        position_ids = np.where(present, present.cumsum(1) - 1, 0).astype(np.int64)
        return position_ids[None], following


def check_image_processor_class(image_processor: Any, expected: str) -> None:
    """Raises CheckpointError unless it is of the class `expected`, which may have a suffix for the library it computes
    with."""
    class_name = type(image_processor).__name__
    if not class_name.startswith(expected):
        raise CheckpointError(
            f"the image processor is a {class_name}, which does not cut images as this family takes them: "
            f"preprocessor_config.json should name {expected}"
        )
