"""VisMem: latent memory that the model calls for itself. Its parts, and how a call of memory becomes latents."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from surgeon.memory.inserted import Initialiser, Inserted
from surgeon.memory.long_former import LongFormer
from surgeon.memory.lora import LowRank
from surgeon.memory.memory_tokens import SHORT, Kind
from surgeon.memory.query_builder import QueryBuilder
from surgeon.memory.short_former import ShortFormer
from surgeon.memory.towers._base import ImageInputs, Tower


class Lent:
    """A module as an argument of another's call: what dispatches models (accelerate) moves all arguments to where the
    called module computes, and this one is to stay where it is."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        if name == "to" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._module, name)


class VisMem(Inserted):
    """Query builder and formers, a child of the base model. Nothing of it runs unless the model calls for memory, and
    what it adapts is adapted within the call alone.

    Source: "VisMem: Latent Vision Memory Unlocks Potential of Vision-Language Models".
    """

    kind: ClassVar[str] = "vismem"
    gates: ClassVar[tuple[str, ...]] = ()

    def __init__(self, builder: QueryBuilder, short: nn.Module, long: LongFormer, window: int) -> None:
        """`short`: a ShortFormer, or a LongFormer of its own. window: the most hidden states of text in a query."""
        super().__init__()
        self.query_builder, self.short, self.long, self.window = builder, short, long, window

    @classmethod
    def of(cls, base_model: Any, decoder: Any, record: Mapping[str, Any], tower: type[Tower] | None) -> Self:
        """The module for a base model, plain or on the meta device. `record`: what the pass recorded. Raises ValueError
        for adapters of layers that are not there."""
        width, rank, alpha = decoder.config.hidden_size, record["rank"], record["alpha"]

        def language(num_latents: int) -> LongFormer:
            return LongFormer(
                decoder, record["layers"], num_latents, record["position_axes"], record["targets"], rank, alpha
            )

        short: nn.Module
        if record["short_former"] == "vision":
            if tower is None:
                raise ValueError("the short former needs the family's tower, and none was passed")
            short = ShortFormer(tower, base_model, record["short"], record["vision_targets"], rank, alpha)
        else:
            short = language(record["short"])
        builder = QueryBuilder(width, record["query"], record["width"])
        return cls(builder, short, language(record["long"]), record["window"])

    def forward(
        self,
        base_model: Any,
        decoder: Any,
        kind: Kind,
        visual_states: Tensor,
        text_states: Tensor,
        images: Sequence[ImageInputs],
    ) -> Tensor:
        """The latents of one invocation in one row: visual_states [V, d] and text_states [T, d] are the decoder's last
        hidden states of the row's images and of what was said since the last invocation; images: the row's -> [N, d].
        Raises ValueError where short memory would have to look at an image again and there is none."""
        hidden_states = self.seen_and_said(visual_states, text_states)
        queries = self.query_builder(hidden_states[None])[0]
        latents: Tensor
        if kind == SHORT and isinstance(self.short, ShortFormer):
            if not images:
                raise ValueError("short memory looks at an image again, and this row has none; call for long memory")
            latents = self.short(base_model, images, queries)
        else:
            former = self.short if kind == SHORT else self.long
            latents = former(decoder, hidden_states, queries)
        return latents

    def seen_and_said(self, visual_states: Tensor, text_states: Tensor) -> Tensor:
        """H, [L, d]: of the text the latest, and of the images as many, evenly spaced, as the query builder takes
        beside it."""
        text_states = text_states[-self.window :]
        most = self.query_builder.max_hidden_states - self.window
        if len(visual_states) > most:
            visual_states = visual_states[evenly_spaced(len(visual_states), most).to(visual_states.device)]
        return torch.cat((visual_states, text_states))

    def initialisers(self, std: float) -> dict[str, Initialiser]:
        """As the parts' own."""
        initialisers: dict[str, Initialiser] = {}
        for path, module in self.named_modules():
            own: dict[str, Initialiser] = {}
            if isinstance(module, LowRank):
                own = module.initialisers()
            elif isinstance(module, QueryBuilder | ShortFormer | LongFormer):
                own = module.initialisers(std)
            initialisers |= {f"{path}.{name}": initialiser for name, initialiser in own.items()}
        return initialisers


def evenly_spaced(count: int, number: int) -> Tensor:
    """`number` of the places 0 to count - 1, the first and the last among them; int64 [number]."""
    return torch.arange(number) * (count - 1) // (number - 1)
