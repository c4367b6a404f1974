"""VisMem's long former: the decoder's last layers go over what was seen and said, and make latents of it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from surgeon.memory.inserted import Initialiser, Normal
from surgeon.memory.lora import Adapters, adapted


class LongFormer(nn.Module):
    """M = F([H, Q, M_init])[-N:], with F the decoder's layers `layers` and its final norm, under LoRA.

    Source: "VisMem", section on memory formation. Grafts of those layers read nothing here: no image stands in this
    sequence, whose positions are counted from 0.
    """

    def __init__(
        self,
        decoder: Any,
        layers: Sequence[int],
        num_latents: int,
        position_axes: int,
        targets: Sequence[str],
        rank: int,
        alpha: float,
    ) -> None:
        """`targets`: linear layers of a decoder layer. Raises ValueError for those that no layer has."""
        super().__init__()
        self.layers, self.position_axes = tuple(layers), position_axes
        self.memory_init = nn.Parameter(torch.empty(num_latents, decoder.config.hidden_size))
        blocks: Mapping[str, nn.Module] = {str(index): decoder.layers[index] for index in self.layers}
        self.adapters = Adapters.of(blocks, targets, rank, alpha)

    def forward(self, decoder: Any, hidden_states: Tensor, queries: Tensor) -> Tensor:
        """hidden_states [L, d], queries [K, d] -> latents [N, d]."""
        x = torch.cat((hidden_states, queries, self.memory_init.to(hidden_states)))[None]
        places = torch.arange(x.shape[1], device=x.device)[None]
        axes = places if self.position_axes == 1 else places.expand(self.position_axes, -1, -1)
        angles = decoder.rotary_emb(x, axes)
        mask = create_causal_mask(config=decoder.config, inputs_embeds=x, attention_mask=None, past_key_values=None)
        for index in self.layers:
            layer = adapted(decoder.layers[index], self.adapters.get_submodule(str(index)))
            x = layer(
                x, attention_mask=mask, position_ids=places, position_embeddings=angles,
                past_key_values=None, use_cache=False,
            )  # fmt: skip
        latents: Tensor = decoder.norm(x)[0, -len(self.memory_init) :]
        return latents

    def initialisers(self, std: float) -> dict[str, Initialiser]:
        """Parameter name -> its value at insertion, the adapters' aside."""
        return {"memory_init": Normal(std)}
