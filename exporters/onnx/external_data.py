"""Whether a bundle's graphs point at what they mean: an initialiser outside a graph is a tensor of a file."""

from pathlib import Path

import onnx

from exporters.onnx.manifest import Manifest
from surgeon.checkpoint import TensorInfo, read_header
from surgeon.errors import BundleError


def check_external_data(directory: Path, manifest: Manifest) -> None:
    """Every header of the weight files is read against its file, and every initialiser that lies in one against the
    tensor that begins at its offset. No weight is read.

    Raises CheckpointError for a weight file that is not whole, BundleError for an initialiser that is no tensor of one.
    """
    starts: dict[tuple[str, int], TensorInfo] = {}
    for file in manifest.weights:
        # an empty tensor has no bytes to point at
        starts |= {(file, info.offset): info for info in read_header(directory / file).values() if info.nbytes}
    for graph in manifest.graphs.values():
        for tensor in onnx.load(directory / graph.file, load_external_data=False).graph.initializer:
            if tensor.data_location != tensor.EXTERNAL:
                continue
            place = {entry.key: entry.value for entry in tensor.external_data}
            offset, length = int(place.get("offset", 0)), int(place["length"])
            info = starts.get((place["location"], offset))
            if info is None or info.nbytes != length:
                raise BundleError(
                    f"{directory}: {graph.file} takes {tensor.name} from bytes {offset} to {offset + length} of "
                    f"{place['location']}, where no tensor of that size lies"
                )
