"""What a patched config records of memory that the model calls for."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from transformers import PretrainedConfig

from surgeon.families import Family
from surgeon.memory.query_builder import NUM_HEADS, POSITIONS
from surgeon.sizes import Positive, Size, TokenId


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class MemoryTokenIds(_Strict):
    """Of each kind of memory the invoke and the end token, and the placeholder of latents."""

    short: Annotated[list[TokenId], Field(min_length=2, max_length=2)]
    long: Annotated[list[TokenId], Field(min_length=2, max_length=2)]
    placeholder: TokenId


class VisMemRecord(_Strict):
    """Query builder and formers, as the options of the pass `vismem`, and what it knew of the checkpoint."""

    query: Size
    short: Size
    long: Size
    short_former: Literal["vision", "language"]
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    rank: Size
    alpha: Positive
    targets: list[str]
    vision_targets: list[str] | None
    window: Size
    width: Size | None
    position_axes: Literal[1, 3]
    """Of the ids that the decoder's rotary embedding takes."""
    token_ids: MemoryTokenIds
    separators: list[TokenId]
    """Tokens that end a sentence or a line."""

    def misfit(self, described: Family, config: PretrainedConfig) -> str | None:
        """Why a model of these sizes cannot have it; None where it can."""
        text = described.text_config(config)
        ids = [*self.token_ids.short, *self.token_ids.long, self.token_ids.placeholder]
        width = self.width or text.hidden_size
        axes = len(set(described.rope_axes(config)))
        if len(set(ids)) < len(ids) or max(ids) >= text.vocab_size:
            return f"token_ids {ids} are not five of {text.vocab_size} ids"
        if len(set(self.layers)) < len(self.layers) or max(self.layers) >= text.num_hidden_layers:
            return f"layers {self.layers} are not layers of a decoder of {text.num_hidden_layers}"
        if self.window + self.query > POSITIONS - 2:
            return f"window {self.window} and query {self.query} leave no room for images in {POSITIONS} positions"
        if width % NUM_HEADS:
            return f"the query builder's width {width} is not divisible by its {NUM_HEADS} heads"
        if self.position_axes != axes:
            return f"position_axes is {self.position_axes}, and the decoder's positions have {axes}"
        if self.short_former == "vision" and described.tower is None:
            return f"short_former is vision, and family {described.model_type} has no tower for it"
        return None
