"""What the tests know of a family: a tiny model of it, and what its prompts and images are prepared with.

Each family has a file in `tests/family_cases`, named by its model_type, with `CASE`. The conformance tests, and every
test that goes over all families, find it there; a family without one fails `tests/conformance`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from transformers import PretrainedConfig

from case_files import cases_in
from surgeon.families import Grid

TEXT: Mapping[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
}
"""A tiny text config; a family's case adds what its own needs."""
TOWER: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
}
TOKEN_IDS = {"image_token_id": 2000, "video_token_id": 2001, "vision_start_token_id": 2002, "vision_end_token_id": 2003}
"""Ids of special tokens where no tokenizer has others."""


class MakeConfig(Protocol):
    def __call__(
        self,
        text: Mapping[str, Any],
        vision: Mapping[str, Any],
        token_ids: Mapping[str, Any],
        tie_word_embeddings: bool,
        **others: Any,
    ) -> PretrainedConfig:
        """A tiny config. `text` and `vision` override its two parts, `token_ids` the ids of special tokens.
        `others`: `text_type`, the type of the text model, and `top`, values of neither part, for families that have
        them."""


@dataclass(frozen=True)
class FamilyCase:
    """One family in the tests."""

    config: MakeConfig
    processor_class: str
    """Name of the class that transformers' AutoProcessor gives."""
    special_tokens: Mapping[str, str | Sequence[str]]
    """Config key -> the token, or tokens, whose id it holds."""
    preprocessor: Callable[[PretrainedConfig], dict[str, Any]]
    """What preprocessor_config.json says."""
    processor: Callable[[PretrainedConfig], dict[str, Any] | None] = lambda config: None
    """What processor_config.json says; None: there is no such file."""
    added_tokens: Sequence[str] = ()
    """Special tokens that the demo's tokenizer lacks."""
    named_tokens: Mapping[str, str] | None = None
    """Special tokens by the names that the family's tokenizer has for them."""
    chat_template: str | None = None
    """None: the demo's own, which is Qwen-VL's."""
    side_multiple: int = 1
    """A number of patches that every side of an image is a multiple of."""
    vision_of_side: Callable[[int], dict[str, Any]] = lambda side: {}
    """The vision config of a tower that sees images of so many patches to a side."""
    pixels_of_side: Callable[[PretrainedConfig, int], tuple[np.ndarray, Grid]] | None = None
    """Random pixel values of one square image of so many patches to a side, as `Family.process_image` gives them, and
    its grid; None: one tile of the tower's size."""
    prompt_passes: Sequence[str] = ()
    """Recipes of passes beyond those for all families, such as `rope-dhr` for one that cuts tiles."""

    def square_image(self, config: PretrainedConfig, side: int) -> tuple[np.ndarray, Grid]:
        if self.pixels_of_side is not None:
            return self.pixels_of_side(config, side)
        size = config.vision_config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return np.random.default_rng(side).standard_normal((1, 3, height, width), dtype=np.float32), (1, 1, 1)


def family_cases() -> dict[str, FamilyCase]:
    """By model_type."""
    return cases_in("family_cases")
