"""Ovis2: a ViT whose blocks of patches become mixtures of visual words."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from surgeon.memory.towers._thumbnails import TiledTower


class Ovis2Tower(TiledTower):
    """Slots that become one vector stand in it as the patches of a block do, row by row."""

    blocks = "vision_tower.transformer.encoder.layers"
    targets = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.out_proj")
    thumbnail = "first"
    separated_tiles = True
    block_arguments = (None,)

    @staticmethod
    def slots_per_vector(config: Any) -> int:
        return int(config.vision_config.hidden_stride**2)

    @staticmethod
    def tokens_per_tile(config: Any) -> int:
        vision = config.vision_config
        side = -(-(vision.image_size // vision.patch_size) // vision.hidden_stride)
        return int(side**2)

    @classmethod
    def embed(cls, base_model: Any, pixel_values: Tensor) -> Tensor:
        embedded: Tensor = base_model.vision_tower.transformer.embeddings(pixel_values)
        return embedded

    @classmethod
    def project(cls, base_model: Any, slots: Tensor) -> Tensor:
        tower = base_model.vision_tower
        merged = tower.transformer.rms_norm(slots).reshape(-1, tower.head_linear.in_features)
        shares = shares_of_words(tower.head_norm(tower.head_linear(merged)), tower.config.tokenize_function)
        # the table's last rows are the indicators', which no slot has a share of
        features: Tensor = base_model.visual_embeddings_table(F.pad(shares, (0, tower.num_visual_indicator_tokens)))
        return features


def shares_of_words(scores: Tensor, tokenize_function: str) -> Tensor:
    """Scores of the visual words [N, V] -> the share of each, [N, V]. Raises ValueError for an unknown function."""
    if tokenize_function == "softmax":
        return scores.softmax(-1)
    if tokenize_function == "gumbel_argmax":
        return F.gumbel_softmax(scores, dim=-1, hard=True)
    if tokenize_function != "st_argmax":
        raise ValueError(f"tokenize_function {tokenize_function!r}: softmax, st_argmax and gumbel_argmax are supported")
    soft = scores.softmax(-1)
    hard = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft)
    return hard - soft.detach() + soft  # the best word alone, with the gradient of all


TOWER = Ovis2Tower
