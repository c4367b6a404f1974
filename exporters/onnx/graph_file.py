"""A graph of a bundle, read from its file."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Self

import onnx_ir as ir

from exporters.onnx.dtypes import NAMES
from exporters.onnx.manifest import GraphFile, Port
from surgeon.errors import BundleError
from surgeon.sizes import one_line

_REMEDY = "the bundle is damaged, export it again"


def read_graph(path: Path, graph_file: GraphFile | None = None) -> ir.Model:
    """The graph, its weights pointed to. Raises BundleError for a file that is missing or no ONNX graph, one with other
    inputs or outputs than bundle.json describes, and for weights that lie outside the bundle or are not all there."""
    if not path.is_file():
        raise BundleError(f"{path} is missing: the bundle is incomplete, export it again")
    try:
        model = ir.load(path)
        ir.to_proto(model)  # which needs names to be text
        ports = ports_of(model.graph.inputs), ports_of(model.graph.outputs)
        tensors = [value.const_value for value in model.graph.initializers.values()]
        external = [_Span.of(tensor) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)]
    except Exception as error:  # all of it is onnx_ir's and protobuf's own, and what they trip over is the file
        raise BundleError(f"{path} is no ONNX graph ({one_line(error)}): {_REMEDY}") from error
    if graph_file is not None:
        for side, actual, expected in zip(
            ("inputs", "outputs"), ports, (graph_file.inputs, graph_file.outputs), strict=True
        ):
            if actual != expected:
                raise BundleError(
                    f"{path} has the {side} {_listed(actual)}, and bundle.json describes {_listed(expected)}: {_REMEDY}"
                )
    for span in external:
        span.check(path)
    return model


def ports_of(values: Iterable[ir.Value]) -> list[Port]:
    """A graph's inputs or outputs as bundle.json describes them. Raises ValueError for one without a type or shape."""
    ports = []
    for value in values:
        if value.shape is None or value.dtype not in NAMES:
            raise ValueError(f"{value.name} has no shape, or is of {value.dtype}")
        shape = [size if isinstance(size, int) else str(size) for size in value.shape]
        ports.append(Port(name=str(value.name), dtype=NAMES[value.dtype], shape=shape))
    return ports


def _listed(ports: Sequence[Port]) -> str:
    text = ", ".join(f"{port.name} {port.dtype} {port.shape}" for port in ports) or "none"
    return text if len(text) <= 200 else f"{text[:197]}..."


@dataclass(frozen=True)
class _Span:
    """Where the values of a weight lie."""

    name: str
    location: PurePosixPath
    offset: int
    length: int
    nbytes: int
    """By its shape and dtype."""

    @classmethod
    def of(cls, tensor: ir.ExternalTensor) -> Self:
        length = tensor.nbytes if tensor.length is None else tensor.length
        return cls(str(tensor.name), PurePosixPath(tensor.location), tensor.offset or 0, length, tensor.nbytes)

    def check(self, graph: Path) -> None:
        if self.location.is_absolute() or ".." in self.location.parts:
            raise BundleError(f"{graph}: {self.name} lies outside the bundle, in {self.location}: {_REMEDY}")
        file = graph.parent / self.location
        if not file.is_file():
            raise BundleError(f"{graph}: {self.name} lies in {self.location}, which is missing: {_REMEDY}")
        size, end = file.stat().st_size, self.offset + self.length
        if self.length != self.nbytes or not 0 <= self.offset <= end <= size:
            raise BundleError(
                f"{graph}: {self.name} takes {self.nbytes} bytes, and lies at {self.offset} to {end} of "
                f"{self.location}, which has {size}: {_REMEDY}"
            )
