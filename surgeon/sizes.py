"""What this tool reads of a config's sizes, checked once where a config comes from outside: transformers checks types,
but hardly a value, and a model of 10^9 layers would never be built to the end."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator
from transformers.activations import ACT2CLS

from surgeon.errors import CheckpointError

_MOST = 1 << 24
Size = Annotated[int, Field(gt=0, le=_MOST)]
"""A width, a number of heads or of tokens. No model has a larger one: what is larger is a slip of the pen."""
Depth = Annotated[int, Field(gt=0, le=4096)]
"""A number of layers. Each is a module of its own, even without weights."""
TokenId = Annotated[int, Field(ge=0, le=_MOST)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _known_activation(name: str) -> str:
    if name not in ACT2CLS:
        raise ValueError(f"transformers has no activation of that name; it has {', '.join(sorted(ACT2CLS))}")
    return name


Activation = Annotated[str, AfterValidator(_known_activation)]


class Sizes(BaseModel):
    """Attributes of a config, or of a part of it. Others may be there."""

    model_config = ConfigDict(strict=True, frozen=True, from_attributes=True)


class RopeSizes(Sizes):
    rope_type: str
    rope_theta: Positive


class TextSizes(Sizes):
    """Of the decoder."""

    model_type: str
    num_hidden_layers: Depth
    hidden_size: Size
    intermediate_size: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    vocab_size: Size
    hidden_act: Activation
    max_position_embeddings: Annotated[int, Field(gt=0)]
    head_dim: Size | None = None
    rms_norm_eps: Positive
    initializer_range: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    rope_parameters: RopeSizes

    @model_validator(mode="after")
    def _heads(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}, "
                "and there is no head_dim"
            )
        head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if head_dim % 2:
            raise ValueError(f"heads are {head_dim} wide, and rotary positions need an even width")
        return self


class VisionSizes(Sizes):
    """What the vision towers of all families have."""

    model_type: str
    depth: Depth = Field(validation_alias=AliasChoices("depth", "num_hidden_layers"))
    hidden_size: Size
    intermediate_size: Size
    hidden_act: Activation
    heads: Size = Field(validation_alias=AliasChoices("num_heads", "num_attention_heads"))

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not divisible by num_heads {self.heads}")
        return self


class SquareTowerSizes(VisionSizes):
    """A vision tower over square images of one size."""

    num_channels: Literal[3]
    image_size: Size
    patch_size: Size

    @model_validator(mode="after")
    def _whole_patches(self) -> Self:
        if self.image_size < self.patch_size:
            raise ValueError(f"image_size {self.image_size} is less than patch_size {self.patch_size}")
        return self


_Model = TypeVar("_Model", bound=BaseModel)


def check(model: type[_Model], value: Any, part: str = "", file: str = "config.json") -> _Model:
    """`value`, which is a file's content or its `part`, as `model` has it. Raises CheckpointError, with the key, for
    what that refuses."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, filter(None, (part, *first["loc"])))) or "the config"
        raise CheckpointError(f"{file}: {key}: {_reason(first)}; copy it from where the checkpoint was made") from error


def _reason(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "not known to this version, which may be too old for the checkpoint"
    if error["type"] == "missing":
        return "missing"
    message, value = error["msg"].removeprefix("Value error, "), error["input"]
    # of a whole object the reason names the values
    plain = isinstance(value, str | int | float | list | tuple | None)
    return f"{message[:1].lower()}{message[1:]}" + (f", found {short(value)}" if plain else "")


class PixelLimits(Sizes):
    """Pixels of an image after it is scaled, least and most."""

    shortest_edge: Annotated[int, Field(gt=0, le=1 << 27)]
    longest_edge: Annotated[int, Field(gt=0, le=1 << 27)]


class TileSize(Sizes):
    height: Annotated[int, Field(gt=0, le=1 << 14)]
    width: Annotated[int, Field(gt=0, le=1 << 14)]


Pinpoints = Annotated[Sequence[Annotated[Sequence[Size], Field(min_length=2, max_length=2)]], Field(min_length=1)]
"""Heights and widths that an image may be scaled to."""


class GenerationTokens(Sizes):
    """What is read of a generation_config.json."""

    eos_token_id: TokenId | list[TokenId] | None = None
    pad_token_id: int | None = None


def check_indexes(name: str, indexes: Sequence[int], count: int) -> None:
    """Raises ValueError unless each is a different one of `count` blocks."""
    if len(set(indexes)) != len(indexes) or not all(0 <= index < count for index in indexes):
        raise ValueError(f"{name} is {short(list(indexes))}, expected different blocks of 0 to {count - 1}")


def one_line(error: Exception, most: int = 300) -> str:
    """What a library's error says, in a message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[: most - 3]}..."


def short(value: Any) -> str:
    """A value in a message."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
