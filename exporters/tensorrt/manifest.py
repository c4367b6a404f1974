"""engine.json: everything about a directory of engines that whoever runs them needs, and what tells a wrong one."""

import hashlib
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from exporters.onnx import manifest as bundles
from exporters.onnx.manifest import Port
from exporters.tensorrt.errors import EngineError
from exporters.tensorrt.library import Backend, Gpu, installed_version
from exporters.tensorrt.profiles import Profile

FILE = "engine.json"
FORMAT = 1
LAYERS = "layers.json"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LibraryUsed(_Strict):
    backend: Backend
    version: str


class EngineFile(_Strict):
    """One graph's engine. Inputs and outputs are those of the bundle's graph, in its order, without inputs whose values
    it does not read."""

    file: str
    bytes: int
    sha256: str
    graph_sha256: str
    """Of the graph that was built, after the rewrites for TensorRT."""
    rewrites: dict[str, int]
    """How many nodes each rewrite replaced."""
    profiles: list[Profile]
    """In the order of their numbers in the engine."""
    inputs: list[Port]
    outputs: list[Port]


class EngineManifest(_Strict):
    """The content of engine.json."""

    format: int = FORMAT
    tool_version: str
    library: LibraryUsed
    targets: list[str]
    """Compute capabilities, such as "sm89"."""
    gpu: str | None = None
    """The GPU that the engines were built on, where no target could be named to the library."""
    dtype: Literal["float16", "bfloat16"]
    bundle_sha256: str
    """Of the bundle.json that the engines were built from."""
    bundle: bundles.Manifest
    """That bundle.json: sizes, tokens, positions, memory, and where the checkpoint came from."""
    engines: dict[str, EngineFile]
    plugins: list[str] = []
    """Plugins that must be registered before the engines are loaded."""

    def save(self, directory: Path) -> None:
        (directory / FILE).write_text(self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, directory: str | Path, verify: bool = True) -> Self:
        """Read and check the manifest of a directory of engines. Neither library needs to be installed.

        verify: read every engine file and compare its digest; else sizes alone are compared. Raises EngineError where
        there are no engines, their format is of a newer version, or a file is missing, damaged or another.
        """
        directory = Path(directory)
        manifest = cls.read(directory)
        for engine in manifest.engines.values():
            _check(directory / engine.file, engine, verify)
        return manifest

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read a manifest, and compare nothing with it. Raises EngineError as `load`."""
        path = directory / FILE
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            raise EngineError(f"{directory} has no {FILE}: make engines of a bundle with `surgeon engine`") from None
        except (OSError, UnicodeDecodeError) as error:
            raise EngineError(f"{path}: cannot read it: {error}") from error
        return cls._parse(text, path)

    @classmethod
    def _parse(cls, text: str, path: Path) -> Self:
        try:
            version = _Version.model_validate_json(text).format
            if version > FORMAT:
                raise EngineError(
                    f"{path} has format {version}, this version of surgeon reads up to {FORMAT}; update surgeon"
                )
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise EngineError(f"{path}: {where}: {first['msg']}; build the engines again") from error

    # -- refusals ------------------------------------------------------------------------------------------------
    def check_library(self, version: str | None = None) -> None:
        """Refuse a library of another version than that which built the engines; by default, the installed one."""
        backend = self.library.backend
        version = version or installed_version(backend)
        if version is None:
            raise EngineError(
                f"the engines need {backend} {self.library.version}, which is not installed: "
                f"pip install {backend}=={self.library.version}"
            )
        if version != self.library.version:
            raise EngineError(
                f"the engines are of {backend} {self.library.version}, here is {version}: build them again, or pip "
                f"install {backend}=={self.library.version}"
            )

    def check_gpu(self, gpu: Gpu | None) -> None:
        """Refuse a GPU that the engines were not built for, and none at all."""
        targets = ", ".join(self.targets)
        if gpu is None:
            raise EngineError(f"the engines run on a GPU ({targets}), and CUDA finds none here")
        if gpu.capability not in self.targets:
            raise EngineError(
                f"the engines are for {targets}, here is {gpu.name} ({gpu.capability}): build them with --target "
                f"{gpu.capability} or --target native"
            )

    def check_bundle(self, bundle: Path) -> None:
        """Refuse a bundle that the engines were not built from."""
        sha256 = bundles.sha256(bundle / bundles.FILE)
        if sha256 is None:
            raise EngineError(f"{bundle} is no bundle: it has no {bundles.FILE}")
        if sha256 != self.bundle_sha256:
            raise EngineError(
                f"the engines are of another bundle than {bundle}: of {self.bundle.source.name}, {self.dtype}, "
                f"{self.bundle.max_length} tokens, bundle.json {self.bundle_sha256[:12]}, not {sha256[:12]}; build "
                "them from this one"
            )


class _Version(BaseModel):
    format: int


def _check(path: Path, engine: EngineFile, verify: bool) -> None:
    try:
        size = path.stat().st_size
    except OSError:
        raise EngineError(f"{path} is missing: build the engines again") from None
    if size != engine.bytes:
        raise EngineError(f"{path} has {size:,} bytes instead of {engine.bytes:,}: it is damaged, build it again")
    if verify and digest(path) != engine.sha256:
        raise EngineError(f"{path} is damaged or another: its digest is not that of {FILE}; build it again")


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
