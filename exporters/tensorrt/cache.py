"""Engines kept for the next build of the very same thing."""

import hashlib
import json
import mmap
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import onnx_ir as ir

from exporters.tensorrt.errors import EngineError
from exporters.tensorrt.manifest import digest
from surgeon.checkpoint import share_file, staged

_FORMAT = 1
"""Raised when what an entry holds, or what is built from the same things, changes."""
_ENGINE, _RESULT = "engine", "result.json"
_CHUNK = 64 << 20
_Kept = TypeVar("_Kept")


def graph_digest(model: bytes) -> str:
    """Of a serialised graph: operators, attributes, shapes, names, and where its weights lie."""
    return hashlib.sha256(model).hexdigest()


def weights_digest(model: ir.Model, base: Path) -> str:
    """Of every byte of the weights that a graph points to: headers alone would tell two fine-tunes of a model, which
    differ in nothing else, for one. Files are mapped and read in pieces, in the order in which they lie."""
    ranges: dict[tuple[str, int, int], None] = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            ranges[str(tensor.location), tensor.offset or 0, tensor.length or 0] = None
    hasher = hashlib.sha256()
    for location, offset, length in sorted(ranges):
        hasher.update(f"{location} {offset} {length}\n".encode())
        if not length:
            continue
        with open(base / location, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            view = memoryview(mapped)
            try:
                for start in range(offset, offset + length, _CHUNK):
                    with view[start : min(start + _CHUNK, offset + length)] as piece:
                        hasher.update(piece)
            finally:
                view.release()
    return hasher.hexdigest()


class BuildCache:
    """A folder of engines by their inputs. Entries appear whole or not at all, and are checked when used."""

    def __init__(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            raise EngineError(f"--cache {folder} is no directory")
        self.folder = folder

    @staticmethod
    def key(build_inputs: Mapping[str, Any]) -> str:
        """The key of everything that an engine depends on, JSON."""
        text = json.dumps({"format": _FORMAT, **build_inputs}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def take(self, key: str, engine: Path, parse: Callable[[Any], _Kept]) -> _Kept | None:
        """Put the cached engine at `engine` -> the content stored with it; None where there is none. `parse` converts
        the stored JSON, and raises ValueError, KeyError or TypeError where it is not what was put there."""
        entry = self.folder / key
        try:
            result: Any = json.loads((entry / _RESULT).read_text())
            content = parse(result["kept"])
            sound = digest(entry / _ENGINE) == result["sha256"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            sound = False
        if not sound:
            warnings.warn(f"{entry} is damaged: it is built again", stacklevel=2)
            shutil.rmtree(entry, ignore_errors=True)
            return None
        share_file(entry / _ENGINE, engine)
        return content

    def put(self, key: str, engine: Path, content: Mapping[str, Any]) -> None:
        """Store an engine, and the JSON `content` with it. Raises TargetError where it cannot be stored whole."""
        sha256 = digest(engine)

        def verify(entry: Path) -> None:
            if digest(entry / _ENGINE) != sha256:
                raise EngineError(f"{engine} changed while it was copied to {entry}")

        with staged(self.folder / key, overwrite=True, verify=verify) as entry:
            share_file(engine, entry / _ENGINE)
            (entry / _RESULT).write_text(json.dumps({"sha256": sha256, "kept": content}, indent=2) + "\n")
