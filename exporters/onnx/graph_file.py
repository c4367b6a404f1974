"""A graph of a bundle, read from its file."""

from pathlib import Path, PurePosixPath

import onnx_ir as ir

from exporters.onnx.manifest import GraphFile
from surgeon.errors import BundleError
from surgeon.sizes import one_line

_REMEDY = "the bundle is damaged, export it again"


def read_graph(path: Path, described: GraphFile | None = None) -> ir.Model:
    """The graph, its weights pointed to. Raises BundleError for a file that is missing or no ONNX graph, one with other
    inputs or outputs than bundle.json describes, and for weights that lie outside the bundle or are not all there."""
    if not path.is_file():
        raise BundleError(f"{path} is missing: the bundle is incomplete, export it again")
    try:
        model = ir.load(path)
        external = {
            str(name): value.const_value
            for name, value in model.graph.initializers.items()
            if isinstance(value.const_value, ir.ExternalTensor)
        }
    except Exception as error:  # all of it is onnx_ir's and protobuf's own, and what they trip over is the file
        raise BundleError(f"{path} is no ONNX graph ({one_line(error)}): {_REMEDY}") from error
    if described is not None:
        for what, values, ports in (
            ("inputs", model.graph.inputs, described.inputs),
            ("outputs", model.graph.outputs, described.outputs),
        ):
            names, expected = [str(value.name) for value in values], [port.name for port in ports]
            if names != expected:
                raise BundleError(
                    f"{path} has the {what} {', '.join(names) or 'none'}, and bundle.json describes "
                    f"{', '.join(expected)}: {_REMEDY}"
                )
    for name, tensor in external.items():
        _check_weights(path, name, tensor)
    return model


def _check_weights(path: Path, name: str, tensor: ir.ExternalTensor) -> None:
    location = PurePosixPath(tensor.location)
    if location.is_absolute() or ".." in location.parts:
        raise BundleError(f"{path}: {name} lies outside the bundle, in {location}: {_REMEDY}")
    file = path.parent / location
    size = file.stat().st_size if file.is_file() else None
    if size is None:
        raise BundleError(f"{path}: {name} lies in {location}, which is missing: {_REMEDY}")
    offset, length = tensor.offset or 0, tensor.nbytes if tensor.length is None else tensor.length
    if length != tensor.nbytes or offset + length > size:
        raise BundleError(
            f"{path}: {name} is {tensor.nbytes} bytes, and bytes {offset} to {offset + length} of {location}, which "
            f"has {size}: {_REMEDY}"
        )
