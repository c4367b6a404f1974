"""Which decoder layers a pass grafts into: the ways to say it, and what they mean for a given depth."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator

from surgeon.pipeline import PreconditionError

_FORMS = "a list of layers (8,16,24), every:N, strided:N or last:N"


def _parse(value: Any) -> list[int] | str:
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    several = isinstance(value, list | tuple | range) and bool(value)
    if several and all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        return list(value)
    if isinstance(value, str):
        text = value.strip().removeprefix("[").removesuffix("]")
        if re.fullmatch(r"(every|strided|last):[1-9]\d*", text):
            return text
        if re.fullmatch(r"-?\d+(\s*,\s*-?\d+)*", text):
            return [int(part) for part in text.split(",")]
    raise ValueError(f"expected {_FORMS}, found {value!r}")


LayerChoice = Annotated[list[int] | str, BeforeValidator(_parse)]


def resolve_layers(choice: list[int] | str, depth: int, pass_name: str) -> list[int]:
    """Zero-based layer indices, ascending, for a decoder of `depth` layers.

    every:N takes the layers i where (i + 1) % N == 0; strided:N takes N layers spread evenly, k * depth / (N + 1);
    last:N the last N.
    Raises PreconditionError for a layer out of range or named twice, and for an N that the depth cannot hold.
    """
    if isinstance(choice, str):
        form, _, count = choice.partition(":")
        n = int(count)
        if n > depth:
            raise PreconditionError(f"pass {pass_name}: layers={choice}, but the decoder has {depth} layers")
        if form == "every":
            return [i for i in range(depth) if (i + 1) % n == 0]
        if form == "last":
            return list(range(depth - n, depth))
        return [min(k * depth // (n + 1), depth - 1) for k in range(1, n + 1)] if n < depth else list(range(depth))
    out_of_range = [i for i in choice if not 0 <= i < depth]
    if out_of_range:
        raise PreconditionError(
            f"pass {pass_name}: layer {out_of_range[0]} is out of range; the decoder has layers 0 to {depth - 1}"
        )
    duplicates = sorted({i for i in choice if choice.count(i) > 1})
    if duplicates:
        raise PreconditionError(f"pass {pass_name}: layer {duplicates[0]} is named twice in layers={choice}")
    return sorted(choice)
