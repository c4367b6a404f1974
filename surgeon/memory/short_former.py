"""VisMem's short former: the vision tower looks at the image again, with a query, and what it saw becomes latents."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.memory.inserted import Initialiser, Normal
from surgeon.memory.lora import Adapters, adapted
from surgeon.memory.towers._base import ImageInputs, Tower


class ShortFormer(nn.Module):
    """M = P(F([X, W Q, M_init]))[-N:], with F the vision tower under LoRA, X the images' patches and P the projector.

    Source: "VisMem", section on memory formation. The paper does not say how a query gets to the width of the vision
    tower; here a linear map W brings it there.
    """

    def __init__(
        self,
        tower: type[Tower],
        base_model: nn.Module,
        num_latents: int,
        targets: Sequence[str] | None,
        rank: int,
        alpha: float,
    ) -> None:
        """`targets`: linear layers of a block, by default the tower's. Raises ValueError for one that no block has."""
        super().__init__()
        self.tower = tower
        config: Any = base_model.config
        width, slots = tower.width(config), num_latents * tower.slots_per_vector(config)
        self.query_map = nn.Linear(config.get_text_config().hidden_size, width, bias=False)
        self.memory_init = nn.Parameter(torch.empty(slots, width))
        blocks = {str(index): block for index, block in enumerate(self._blocks(base_model))}
        self.adapters = Adapters.of(blocks, tower.targets if targets is None else targets, rank, alpha)

    def forward(self, base_model: Any, images: Sequence[ImageInputs], queries: Tensor) -> Tensor:
        """images: of one request, at least one; queries [K, d] -> latents [N, d]."""
        blocks = [
            adapted(block, self.adapters.get_submodule(str(index)))
            for index, block in enumerate(self._blocks(base_model))
        ]
        behind = torch.cat((self.query_map(queries.to(self.query_map.weight.dtype)), self.memory_init))
        encoded = self.tower.encode(base_model, blocks, images, behind)
        return self.tower.project(base_model, encoded[len(queries) :])

    def _blocks(self, base_model: Any) -> list[nn.Module]:
        """Those that the visual embeddings come from."""
        blocks = list(base_model.get_submodule(self.tower.blocks).children())
        return blocks[: self.tower.depth(base_model.config)]

    def initialisers(self, std: float) -> dict[str, Initialiser]:
        """Parameter name -> its value at insertion, the adapters' aside."""
        return {"query_map.weight": Normal(std), "memory_init": Normal(std)}
