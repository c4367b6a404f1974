"""Optimisation profiles: the range of every symbolic dimension that an engine takes.

The graphs' symbols are those of docs/bundle.md: B rows, S new tokens, T wanted logits, M visual tokens, L hidden states
that a query is built of. In vision.onnx M is of one image, W counts windows of it, T tiles; in short_former.onnx M and
W are of all images of a row, T counts their thumbnails. A dimension may be a multiple of a symbol.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict

from exporters.onnx.manifest import PROCESSOR, GraphFile, Manifest, Port
from exporters.tensorrt.errors import EngineError
from surgeon.families import family
from surgeon.memory.query_builder import POSITIONS
from surgeon.side_files import image_processor_settings

LOGITS = 64
"""Positions of a prefill that one call gives logits of, at most: a vocabulary is wide, and a prefill long."""
_COMMON = 1024
"""What tactics are chosen for, where a range reaches that far."""
_LARGEST_VOLUME = 2**31 - 1
"""Elements of one tensor, in both libraries."""
_MANY_TILES = 12
"""What models cut an image into, where a bundle does not say."""
_DIMENSION = re.compile(r"(?:(\d+)\*)?([A-Za-z]\w*)")


class Range(BaseModel):
    """Sizes that a dimension may have, and the one to be fastest for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min: int
    opt: int
    max: int

    @classmethod
    def of(cls, smallest: int, largest: int, usual: int = _COMMON) -> Self:
        return cls(min=smallest, opt=max(smallest, min(largest, usual)), max=largest)

    @classmethod
    def parse(cls, text: str, option: str, usual: int = _COMMON) -> Self:
        """ "1..4096", or "1..512..4096" with the size to be fastest for, or one size "8". Raises EngineError."""
        parts = text.split("..")
        if not 1 <= len(parts) <= 3 or not all(part.isascii() and part.isdigit() for part in parts):
            raise EngineError(f"{option} {text}: write LOW..HIGH, LOW..USUAL..HIGH or one number")
        numbers = [int(part) for part in parts]
        if numbers != sorted(numbers) or numbers[0] < 1:
            raise EngineError(f"{option} {text}: sizes start at 1 and do not fall")
        if len(numbers) == 3:
            return cls(min=numbers[0], opt=numbers[1], max=numbers[2])
        return cls.of(numbers[0], numbers[-1], usual)

    @classmethod
    def fixed(cls, size: int) -> Self:
        return cls(min=size, opt=size, max=size)

    def __str__(self) -> str:
        """As it would be asked for."""
        if self.opt == type(self).of(self.min, self.max).opt:
            return str(self.min) if self.min == self.max else f"{self.min}..{self.max}"
        return f"{self.min}..{self.opt}..{self.max}"


class Profile(BaseModel):
    """One profile of an engine: by the graph's symbols."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    sizes: dict[str, Range]

    def shapes(self, ports: Collection[Port]) -> dict[str, tuple[list[int], list[int], list[int]]]:
        """Smallest, usual and largest shape of each port that has a symbolic dimension."""
        return {
            port.name: (self._shape(port, "min"), self._shape(port, "opt"), self._shape(port, "max"))
            for port in ports
            if not all(isinstance(size, int) for size in port.shape)
        }

    def largest(self, port: Port) -> list[int]:
        return self._shape(port, "max")

    def _shape(self, port: Port, which: str) -> list[int]:
        return [size if isinstance(size, int) else self._size(size, which) for size in port.shape]

    def _size(self, dimension: str, which: str) -> int:
        factor, symbol = split_dimension(dimension)
        return factor * int(getattr(self.sizes[symbol], which))


def split_dimension(dimension: str) -> tuple[int, str]:
    """ "4*M" -> 4, "M". Raises EngineError for another expression."""
    match = _DIMENSION.fullmatch(dimension)
    if match is None:
        raise EngineError(f"the bundle has a dimension {dimension!r}, which no profile is known for; update surgeon")
    return int(match[1] or 1), match[2]


@dataclass(frozen=True)
class Limits:
    """What the engines are to take, as asked for. None: as much as the bundle and the prefill hold."""

    prefill: Range | None = None
    """Tokens of one prefill."""
    batch: Range = Range(min=1, opt=1, max=1)  # noqa: RUF009 (it is frozen)
    image_tokens: Range | None = None
    """Visual tokens of one image."""
    visual_tokens: Range | None = None
    """Visual tokens in the memory of a row, all images together; grafted models."""

    @classmethod
    def parse(cls, prefill: str | None, batch: str, image_tokens: str | None, visual_tokens: str | None) -> "Limits":
        """From what the command line takes. Raises EngineError."""

        def optional(text: str | None, option: str) -> Range | None:
            return None if text is None else Range.parse(text, option)

        return cls(
            prefill=optional(prefill, "--prefill"),
            batch=Range.parse(batch, "--batch", usual=1),
            image_tokens=optional(image_tokens, "--image-tokens"),
            visual_tokens=optional(visual_tokens, "--visual-tokens"),
        )


def make_profiles(bundle: Path, manifest: Manifest, limits: Limits) -> dict[str, list[Profile]]:
    """The profiles of every graph of a bundle. Raises EngineError, with the numbers, where they do not fit it."""
    prefill = limits.prefill or Range.of(1, manifest.max_length)
    if prefill.max > manifest.max_length:
        raise EngineError(
            f"--prefill {prefill}: the bundle's caches hold {manifest.max_length} tokens; take at most that, or export "
            f"again with --max-length {prefill.max}"
        )
    vision = _vision(bundle, manifest, prefill, limits.image_tokens)
    visual = limits.visual_tokens or Range.of(1, max(prefill.max, vision.tokens))
    if visual.min != 1:
        raise EngineError(f"--visual-tokens {visual}: a row without images has one slot, so it must start at 1")
    if visual.max < vision.tokens and manifest.memory:
        raise EngineError(
            f"--visual-tokens {visual}: one image has up to {vision.tokens} visual tokens (--image-tokens), which "
            "do not fit"
        )
    rows = {"B": limits.batch}
    memory = {"M": visual}
    decode = Profile(name="decode", sizes=rows | {"S": Range.fixed(1), "T": Range.fixed(1)} | memory)
    logits = Range(min=1, opt=1, max=min(prefill.max, LOGITS))
    longer = Profile(name="prefill", sizes=rows | {"S": prefill, "T": logits} | memory)
    profiles = {
        "embed": [Profile(name="any", sizes=rows | {"S": Range(min=1, opt=prefill.opt, max=prefill.max)})],
        "vision": [vision.profile],
        "memory": [Profile(name="any", sizes=rows | memory)],
        "decoder": [decode, longer],
        **_formers(manifest, vision, visual),
    }
    trimmed = {name: [_trimmed(p, graph) for p in profiles[name]] for name, graph in manifest.graphs.items()}
    for name, graph in manifest.graphs.items():
        for profile in trimmed[name]:
            _check_volumes(name, graph, profile)
    return trimmed


def _formers(manifest: Manifest, vision: "_Vision", visual: Range) -> dict[str, list[Profile]]:
    """Of a model that calls for memory: one row at a time; the short former over all images of a row."""
    if manifest.vismem is None:
        return {}
    said = {"L": Range.of(1, POSITIONS - manifest.vismem.query)}
    images = dict(vision.profile.sizes)
    if "M" in images:  # merged patches of all images; windows grow with them
        images["M"] = Range.of(images["M"].min, max(images["M"].max, visual.max), images["M"].opt)
    if "T" in images:  # a thumbnail of each image
        images["T"] = Range.of(1, max(1, visual.max // max(1, vision.tokens_per_tile)), usual=1)
    any_of_them = [Profile(name="any", sizes=said | images)]
    return {"query_builder": any_of_them, "short_former": any_of_them, "long_former": any_of_them}


def _trimmed(profile: Profile, graph: GraphFile) -> Profile:
    """With those symbols alone that the graph's inputs have."""
    input_symbols = symbols(graph.inputs)
    if unknown := sorted(input_symbols - profile.sizes.keys()):
        raise EngineError(f"{graph.file} has a dimension {unknown[0]!r}, which no profile is known for; update surgeon")
    return Profile(
        name=profile.name, sizes={name: size for name, size in profile.sizes.items() if name in input_symbols}
    )


def symbols(ports: Collection[Port]) -> set[str]:
    return {split_dimension(size)[1] for port in ports for size in port.shape if isinstance(size, str)}


def _check_volumes(name: str, graph: GraphFile, profile: Profile) -> None:
    for port in (*graph.inputs, *graph.outputs):
        volume = math.prod(profile.largest(port))
        if volume > _LARGEST_VOLUME:
            memory = ", --visual-tokens" if port.name.startswith("memory_") else ""
            raise EngineError(
                f"{name}: {port.name} would have up to {profile.largest(port)} = {volume:,} elements, TensorRT takes "
                f"{_LARGEST_VOLUME:,}; lower --batch or --prefill{memory}, or export with a smaller --max-length"
            )


# -- images --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Vision:
    profile: Profile
    tokens: int
    """Visual tokens that one image has at most."""
    tokens_per_tile: int = 1
    """At least, where it cuts tiles."""


def _vision(bundle: Path, manifest: Manifest, prefill: Range, image_tokens: Range | None) -> _Vision:
    graph = manifest.graphs.get("vision")
    if graph is None:
        return _Vision(Profile(name="any", sizes={}), 1)
    input_symbols = symbols(graph.inputs)
    tiles_alone = "M" not in input_symbols  # features [n * T, d]: every tile has n tokens
    per_tile = _tokens_per_tile(graph) if tiles_alone else 1
    tokens = image_tokens or Range.of(
        per_tile, max(per_tile, _usual_tokens(bundle, manifest, prefill, per_tile, tiles_alone))
    )
    # tiles that go into the memory alone need no room in the sequence
    if tokens.max > manifest.max_length and manifest.allocation != "memory":
        raise EngineError(
            f"--image-tokens {tokens}: the bundle's caches hold {manifest.max_length} tokens, images among them; "
            f"take at most that, or export again with --max-length {tokens.max}"
        )
    sizes: dict[str, Range] = {}
    if "M" in input_symbols:
        sizes["M"] = tokens
    if "W" in input_symbols:
        sizes["W"] = _windows(graph, tokens)
    if "T" in input_symbols:
        if tiles_alone:
            if tokens.max < per_tile:
                raise EngineError(f"--image-tokens {tokens}: one tile of this model has {per_tile} tokens already")
            sizes["T"] = Range(
                min=math.ceil(tokens.min / per_tile), opt=tokens.opt // per_tile or 1, max=tokens.max // per_tile
            )
        else:
            sizes["T"] = Range.of(1, _most_tiles(bundle, manifest))
    return _Vision(Profile(name="any", sizes=sizes), tokens.max, per_tile if tiles_alone else tokens.min)


def _tokens_per_tile(graph: GraphFile) -> int:
    features = next(port for port in graph.outputs if port.name == "features")
    return split_dimension(str(features.shape[0]))[0]


def _usual_tokens(bundle: Path, manifest: Manifest, prefill: Range, per_tile: int, tiles_alone: bool) -> int:
    """As many as a prefill holds; of tiles no more than the processor cuts."""
    if not tiles_alone:
        return prefill.max
    most = per_tile * _most_tiles(bundle, manifest)
    return most if manifest.allocation == "memory" else min(most, prefill.max // per_tile * per_tile)


def _windows(graph: GraphFile, tokens: Range) -> Range:
    """Square windows over images of so many tokens: as few as one, as many as an image one window high has."""
    patches = next(int(port.shape[1]) for port in graph.inputs if port.name == "window_gather")
    merge, _ = split_dimension(next(str(port.shape[0]) for port in graph.inputs if port.name == "pixel_values"))
    area = max(1, patches // merge)
    side = math.isqrt(area)
    smallest, common = math.ceil(tokens.min / area), math.ceil(tokens.opt / area)
    return Range(min=smallest, opt=common, max=max(common, math.ceil(tokens.max / side)))


def _most_tiles(bundle: Path, manifest: Manifest) -> int:
    """Tiles of one image, the thumbnail included, that the bundle's image processor cuts at most; it may have none."""
    settings = image_processor_settings(bundle / PROCESSOR)
    return family(manifest.source.model_type).most_tiles(settings) or _MANY_TILES + 1


def cache_bytes(manifest: Manifest, profiles: Mapping[str, Sequence[Profile]], prefixes: tuple[str, ...]) -> int:
    """Bytes of the decoder's inputs whose names start with one of `prefixes`, at their largest."""
    graph = manifest.graphs.get("decoder")
    if graph is None:
        return 0
    itemsize = {"float32": 4, "float16": 2, "bfloat16": 2}
    return sum(
        max(math.prod(profile.largest(port)) for profile in profiles["decoder"]) * itemsize[port.dtype]
        for port in graph.inputs
        if port.name.startswith(prefixes)
    )
