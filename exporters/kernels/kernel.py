"""What a kernel is to those that launch it, compile it ahead of time, or make a node of a graph of it.

Sizes may be numbers, or anything with `+`, `*` and `//` (a node's symbolic dimensions).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from surgeon.discovery import Extensions

Dim = Any
Shape = tuple[Dim, ...]


def cdiv(size: Dim, block: int) -> Dim:
    return (size + (block - 1)) // block


def power_of_two(size: int, least: int = 1) -> int:
    """The smallest power of two from `size` and `least` on."""
    return max(least, 1 << max(0, size - 1).bit_length())


@dataclass(frozen=True)
class TileConfig:
    """How a launch cuts its work; which fields count is the kernel's affair."""

    tokens: int = 1
    """Tokens of a tile. 1 is the decoding form; else a power of two from 16 on."""
    outputs: int = 16
    """Output columns of a tile: a power of two, from 16 on where there are several tokens."""
    inner: int = 128
    """How much of the summed axis is read at a time: a power of two, from 16 on."""
    slots: int = 64
    """Memory slots of a tile: a power of two, from 16 on."""
    splits: int = 1
    """How many programs share the memory of one token and head."""
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class Output:
    shape: Shape
    dtype: str
    """"float32" or "int32", or the name of the input whose dtype it has."""


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel and its reference implementation.

    The kernel's parameters are, in this order, pointers to `inputs`, the int32 `sizes`, pointers to the outputs, and
    constants; an input may be None. `definition(*inputs, **options)` gives the outputs in torch, computed in fp32.
    """

    name: str
    function: Any
    definition: Callable[..., tuple[Any, ...]]
    inputs: tuple[str, ...]
    sizes: Callable[[Mapping[str, Shape]], dict[str, Dim]]
    outputs: Callable[[Mapping[str, Shape], Mapping[str, Any], TileConfig], dict[str, Output]]
    constants: Callable[[Mapping[str, Shape], Mapping[str, Any], TileConfig], dict[str, Any]]
    grid: Callable[[Mapping[str, Shape], Mapping[str, Any], TileConfig], tuple[Dim, Dim, Dim]]


@dataclass(frozen=True)
class Step:
    """One launch of a chain: a kernel between named values."""

    name: str
    """Unique among all chains' steps, such as "pvm_output"."""
    kernel: Kernel
    inputs: Mapping[str, str]
    """Kernel input -> value; inputs left out are None."""
    outputs: Mapping[str, str]
    """Kernel output -> value."""
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Chain:
    """What a graft computes, in launches, each reading what those before it wrote. Each is itself alone, so that plans
    can be kept by it."""

    name: str
    inputs: tuple[str, ...]
    """Names of the input values, in the order of the graft's reference implementation."""
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Chains:
    """What a kind of graft does, in launches."""

    attend: Callable[[float], Chain]
    """eps -> hidden states and memory, to what the graft adds to the residual stream."""
    write_memory: Callable[[float, int], Chain]
    """eps, head_dim -> visual embeddings to the graft's keys and values."""


_CHAINS = Extensions("exporters.kernels", "CHAINS", group="surgeon.chains")


def chains_of(kind: str) -> Chains | None:
    """Of a kind of graft; None where there are no kernels for it."""
    return _CHAINS.get(kind)
