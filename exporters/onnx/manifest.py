"""bundle.json: everything about a bundle that whoever runs it needs, and what tells a damaged one."""

import hashlib
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from surgeon.checkpoint.headers import header_bytes
from surgeon.errors import BundleError, CheckpointError
from surgeon.memory.visibility import Visibility
from surgeon.record import Allocation, Layout, PositionScheme
from surgeon.record_vismem import VisMemRecord

FILE = "bundle.json"
PROCESSOR = "processor"
"""The folder with config.json, tokenizer, chat template, image processor and generation config."""
FORMAT = 5
"""1: without `layout`, `positions` and `allocation`, which it is read as, and without memories that need positions. 2:
without `visibility`, which it is read as, and without digests of weight files and of the processor's. 3: without
digests of the checkpoint's files. 4: without `vismem`, which it is read as."""


NOT_ASKED = "it was not asked for"
"""Why what overflows fp16 was not measured, where the caller did not want it."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _inside(path: str) -> str:
    parts = PurePosixPath(path)
    if not path or parts.is_absolute() or ".." in parts.parts:
        raise ValueError(f"{path!r} is no path inside the bundle")
    return path


_Inside = Annotated[str, AfterValidator(_inside)]
_Size = Annotated[int, Field(strict=True, gt=0, le=1 << 32)]
_Count = Annotated[int, Field(strict=True, ge=0, le=1 << 32)]


class Source(_Strict):
    """The checkpoint that was exported."""

    name: str
    fingerprint: str
    model_type: str
    """The family's, without the prefix of a patched checkpoint."""
    grafts: list[dict[str, Any]]
    """The config's record of grafts; empty for a plain model."""
    sha256: dict[str, str] = {}
    """Its weight files, by path relative to it; empty where they were not computed, as in `WeightFile`."""


class Sizes(_Strict):
    num_hidden_layers: _Size
    num_key_value_heads: _Size
    head_dim: _Size
    hidden_size: _Size
    vocab_size: _Size
    position_axes: _Size
    deepstack: _Count
    """How many DeepStack features vision.onnx gives and decoder.onnx takes; 0 where there is none."""


class Tokens(_Strict):
    image: _Count
    visual: list[_Count]
    """Every token id whose embedding is a visual one."""
    indicators: list[_Count] = []
    """The ids that get the embeddings `indicators` of vision.onnx, in their order, in a row with images."""
    eos: list[_Count]
    pad: _Count | None


class Port(_Strict):
    """An input or output of a graph."""

    name: str
    dtype: Annotated[str, Field(pattern="^(float32|float16|bfloat16|int64|bool)$")]
    """As numpy writes it: "float32", "float16", "int64", "bool"; and "bfloat16"."""
    shape: list[int | str]
    """Sizes, or the symbols of docs/bundle.md."""


class GraphFile(_Strict):
    file: _Inside
    sha256: str
    inputs: list[Port]
    outputs: list[Port]


class WeightFile(_Strict):
    bytes: int
    header_sha256: str
    sha256: str | None = None
    """None where it was not computed: it takes the time of reading the file once."""
    how: Literal["reflink", "hardlink", "copy", "converted"]


class MemoryEntry(_Strict):
    """A graft's entry in the visual memory: `memory_keys.<layer>.<kind>` and `memory_values.<layer>.<kind>`."""

    layer: _Count
    kind: str
    num_key_value_heads: _Size
    head_dim: _Size


class Activation(_Strict):
    """The largest absolute value that a value of a graph was seen to have."""

    graph: str
    layer: str
    """By the model's names, such as model.visual.blocks.3."""
    operator: str
    value: str
    """Its name in the graph, functions inlined."""
    max_abs: float


class Precision(_Strict):
    """Where fp16's range was enough, as measured; the rules are in docs/precision.md."""

    limit: float
    margin: float
    prompts: int
    """How many were measured; 0 where `skipped` says why none was."""
    skipped: str | None = None
    largest: list[Activation] = []
    """Of each layer, in the order of the graphs."""
    widened: list[Activation] = []
    """What is fp32 in the graphs because it would not fit in fp16 with the margin."""


class Manifest(_Strict):
    """The content of bundle.json."""

    format: int = FORMAT
    tool_version: str
    source: Source
    dtype: Literal["float32", "float16", "bfloat16"]
    max_length: _Size
    sizes: Sizes
    tokens: Tokens
    layout: Layout | None = None
    """Where tiles matter to positions or to the memory."""
    positions: PositionScheme | None = None
    allocation: Allocation = "both"
    """Where an image's tiles go beside its thumbnail: into the sequence and the memory, or into one of them."""
    visibility: Visibility = "all"
    """Which tokens see an image in the memory: `causal`, those that stand at or behind it, and the decoder's
    `memory_mask` is of each token; or all of its row."""
    vismem: VisMemRecord | None = None
    """Of a model that calls for memory: the record of query builder and formers, which are graphs then."""
    precision: Precision | None = None
    """Of fp16 bundles."""
    memory: list[MemoryEntry]
    graphs: dict[str, GraphFile]
    weights: dict[_Inside, WeightFile]
    """By path relative to the bundle."""
    processor: dict[str, str] = {}
    """The files of the folder `processor` -> their SHA-256."""

    def save(self, directory: Path) -> None:
        (directory / FILE).write_text(self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Read and check a bundle's manifest. No weight is read: weight files are known by their size and header.

        Raises BundleError where there is no bundle, its format is of a newer version, or a file is missing or another.
        """
        directory = Path(directory)
        manifest = cls.read(directory)
        for graph in manifest.graphs.values():
            _check(directory, graph.file, None, graph.sha256, sha256(directory / graph.file))
        for path, weights in manifest.weights.items():
            _check(directory, path, weights.bytes, weights.header_sha256, header_sha256(directory / path))
        return manifest

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read a bundle's manifest, and compare nothing with it. Raises BundleError as `load`."""
        try:
            text = (directory / FILE).read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            raise BundleError(f"{directory} is no bundle: it has no {FILE}; make one with `surgeon export`") from None
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"{directory / FILE}: cannot read it: {error}") from error
        return cls.parse(text, directory / FILE)

    @classmethod
    def parse(cls, text: str, path: Path) -> Self:
        """The manifest that `text`, the content of `path`, holds. Raises BundleError."""
        try:
            version = _Version.model_validate_json(text).format
            if version > FORMAT:
                raise BundleError(
                    f"{path} has format {version}, this version of surgeon reads up to {FORMAT}; update surgeon"
                )
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise BundleError(f"{path}: {where}: {first['msg']}; export the bundle again") from error


class _Version(BaseModel):
    format: int


def sha256(path: Path) -> str | None:
    """Of a file's content, hex; None where there is no such file."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def header_sha256(path: Path) -> str | None:
    """Of a safetensors file's header, hex; None where there is no such file or it has no whole header."""
    try:
        return hashlib.sha256(header_bytes(path)).hexdigest()
    except CheckpointError:
        return None


def _check(directory: Path, name: str, size: int | None, digest: str, actual: str | None) -> None:
    path = directory / name
    if not path.is_file():
        raise BundleError(f"{directory}: {name} is missing; export the bundle again, or copy it whole")
    if size is not None and path.stat().st_size != size:
        raise BundleError(
            f"{directory}: {name} has {path.stat().st_size} bytes, {FILE} says {size}; export the bundle again"
        )
    if actual != digest:
        raise BundleError(f"{directory}: {name} is not the file that {FILE} describes; export the bundle again")
