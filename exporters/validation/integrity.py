"""`surgeon validate --bytes`: whether files are still those that a manifest or a patch recorded, to the last byte."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from exporters.artifact import ARTIFACT_KINDS, artifact_kind
from exporters.onnx.digests import sha256_of_files
from exporters.onnx.manifest import PROCESSOR, Manifest
from surgeon.checkpoint import Checkpoint
from surgeon.errors import BundleError, CheckpointError
from surgeon.families import family
from surgeon.grafts import asks_for_patched_class
from surgeon.memory.patched import RECORD
from surgeon.models import read_model
from surgeon.parity.added_tokens import tokens_added
from surgeon.parity.report import Check
from surgeon.progress import Progress
from surgeon.remote_code import travelling_files
from surgeon.version import __version__
from surgeon.weights import Stored

_SHOWN = 10
"""Tensors that are named, of those that differ."""


def check_bytes(a: str | Path, b: str | Path | None = None, progress: Progress | None = None) -> list[Check]:
    """What was recorded of each path's files, and of where each came from if that is the other, against what is there.

    A bundle: every file. Engines: every engine and the processor's files. A patched checkpoint: its source's
    fingerprint, and every tensor of the source. A checkpoint alone records nothing of its own bytes. Raises
    CheckpointError for that, BundleError for a bundle without digests, and both for what cannot be read.
    """
    paths = sorted(
        (path for path in (a, b) if path is not None), key=lambda path: ARTIFACT_KINDS.index(artifact_kind(path))
    )
    forms = [artifact_kind(path) for path in paths]
    if forms == ["checkpoint"]:
        raise CheckpointError(
            f"nothing is recorded of the bytes of {a}: name the checkpoint that it was made of too, or a bundle of it"
        )
    checks = []
    for path, form in zip(paths, forms, strict=True):
        if form == "bundle":
            checks.append(_bundle(Path(path), progress))
        elif form == "engines":
            checks.append(_engines(Path(path), progress))
    match forms:
        case ["checkpoint", "checkpoint"]:
            checks.append(_patched(*paths))
        case ["checkpoint", "bundle"]:
            checks.append(_exported(paths[0], Path(paths[1]), progress))
        case ["bundle", "engines"]:
            checks.append(_built(Path(paths[0]), Path(paths[1])))
    return checks


# -- files against digests -----------------------------------------------------------------------------------------
def _bundle(directory: Path, progress: Progress | None) -> Check:
    manifest = Manifest.read(directory)
    expected = {graph.file: graph.sha256 for graph in manifest.graphs.values()}
    for name, weights in manifest.weights.items():
        if weights.sha256 is None:
            raise _without_digests(directory, name)
        expected[name] = weights.sha256
    return _compared(directory, expected | _processor(manifest), progress)


def _without_digests(bundle: Path, of: str) -> BundleError:
    return BundleError(
        f"{bundle} records no digest of {of}: it was exported with --no-digests or by an older version of surgeon; "
        "export it again"
    )


def _engines(directory: Path, progress: Progress | None) -> Check:
    from exporters.tensorrt.manifest import EngineManifest

    manifest = EngineManifest.read(directory)
    expected = {engine.file: engine.sha256 for engine in manifest.engines.values()}
    return _compared(directory, expected | _processor(manifest.bundle), progress)


def _processor(manifest: Manifest) -> dict[str, str]:
    return {f"{PROCESSOR}/{name}": digest for name, digest in manifest.processor.items()}


def _compared(directory: Path, expected: Mapping[str, str], progress: Progress | None) -> Check:
    paths = {name: directory / name for name in expected if (directory / name).is_file()}
    digests = sha256_of_files(list(paths.values()), progress)
    failures = [f"{directory / name} is missing" for name in expected if name not in paths]
    failures += [
        f"{path} is not the file that was recorded: SHA-256 {digests[path][:12]}, not {expected[name][:12]}"
        for name, path in paths.items()
        if digests[path] != expected[name]
    ]
    # a file more in the processor's folder may be read in the place of another
    more = sorted(path for path in (directory / PROCESSOR).glob("*") if f"{PROCESSOR}/{path.name}" not in expected)
    failures += [f"{path} was not there when the others were recorded" for path in more]
    return Check("bytes", f"{len(expected)} files of {directory} have the SHA-256 that was recorded", failures)


# -- a form against the one it was built from ----------------------------------------------------------------------
def _patched(a: str | Path, b: str | Path) -> Check:
    """Whichever of the two was patched, against the other."""
    with Checkpoint.open(a) as source, Checkpoint.open(b) as patched:
        if source.config.get(RECORD) and not patched.config.get(RECORD):
            source, patched = patched, source
        recorded = (patched.config.get(RECORD) or {}).get("source", {})
        failures = []
        if recorded and recorded.get("fingerprint") != source.fingerprint():
            failures.append(
                f"{patched.directory} was made of {recorded.get('name')}, {str(recorded.get('fingerprint'))[:12]}, and "
                f"{source.directory} is {source.fingerprint()[:12]}: another checkpoint, or altered since"
            )
        failures += _code(patched)
        rows = _added_rows(source, patched)
        reasons = {name: _difference(source, patched, name, rows.get(name, ())) for name in source.tensors}
        altered = {name: why for name, why in reasons.items() if why is not None}
        failures += [
            f"{patched.directory}: {name} is not that of {source.directory}: {why}"
            for name, why in list(altered.items())[:_SHOWN]
        ]
        if len(altered) > _SHOWN:
            failures.append(f"and {count(len(altered) - _SHOWN, 'more tensor')}")
        tensors = count(len(source.tensors), "tensor")
        summary = f"{tensors} of {source.directory} in {patched.directory}, byte for byte"
        return Check("bytes", summary, failures)


def _added_rows(source: Checkpoint, patched: Checkpoint) -> dict[str, list[int]]:
    """Of the source's tables with a row for each token, by key: the rows of tokens that the patched one adds."""
    added = [*tokens_added(*(checkpoint.config.get(RECORD) for checkpoint in (source, patched))).values()]
    if not added:
        return {}
    weights, described = read_model(source).weights, family(source.config["model_type"])
    return {table.key: added for name in described.token_tables if isinstance(table := weights[name], Stored)}


def _code(patched: Checkpoint) -> list[str]:
    """The Python that travels with a checkpoint of this version, which transformers runs where this tool is not."""
    record = patched.config.get(RECORD) or {}
    if record.get("version") != __version__ or not asks_for_patched_class(record):
        return []
    model_family = family(patched.config["model_type"])
    return [
        f"{patched.directory / name} is not what this version writes: patch the source again"
        for name, text in travelling_files(model_family, record).items()
        if not (patched.directory / name).is_file() or (patched.directory / name).read_text(encoding="utf-8") != text
    ]


def _difference(source: Checkpoint, other: Checkpoint, name: str, added: Sequence[int]) -> str | None:
    """Why a tensor of the one is not that of the other, in words; None where it is. `added`: its rows that are the
    other's alone."""
    if name not in other.tensors:
        return "it is missing"
    a, b = source.tensors[name], other.tensors[name]
    shape = (max(a.shape[0], max(added) + 1), *a.shape[1:]) if added else a.shape
    if b.shape != shape:
        return f"its shape is {list(b.shape)}, not {list(shape)}"
    if a.dtype != b.dtype:
        return f"it is stored as {b.dtype}, not {a.dtype}"
    if a.file.samefile(b.file) and a.offset == b.offset:
        return None
    try:
        pairs = zip(*(_parts(each.read(name), added, a.shape) for each in (source, other)), strict=True)
        equal = all(torch.equal(*(part.flatten().view(torch.uint8) for part in pair)) for pair in pairs)
    finally:
        source.release(name)
        other.release(name)
    return None if equal else "it has other values"


def _parts(tensor: torch.Tensor, left_out: Sequence[int], shape: Sequence[int]) -> Iterator[torch.Tensor]:
    """A tensor without some rows, and cut to `shape`: the rows between those that are left out."""
    if not left_out:
        yield tensor
        return
    first = 0
    for row in [*sorted(row for row in left_out if row < shape[0]), shape[0]]:
        if row > first:
            yield tensor[first:row]
        first = row + 1


def _exported(directory: str | Path, bundle: Path, progress: Progress | None) -> Check:
    """The checkpoint's weight files, and its fingerprint, against what the bundle recorded of them."""
    source = Manifest.read(bundle).source
    if not source.sha256:
        raise _without_digests(bundle, "the weight files it was exported from")
    with Checkpoint.open(directory) as checkpoint:
        failures = []
        if checkpoint.fingerprint() != source.fingerprint:
            failures.append(
                f"{bundle} was exported from {source.name}, {source.fingerprint[:12]}, and "
                f"{directory} is {checkpoint.fingerprint()[:12]}: another checkpoint, or altered since"
            )
        files = {path.relative_to(checkpoint.directory).as_posix(): path for path in checkpoint.files}
        digests = sha256_of_files(list(files.values()), progress)
    failures += [
        f"{directory} has no {name}, which {bundle} was exported from" for name in source.sha256.keys() - files
    ]
    failures += [
        f"{path} is not the file that {bundle} was exported from"
        for name, path in files.items()
        if digests[path] != source.sha256.get(name)
    ]
    summary = f"{bundle} records the fingerprint of {directory}, and the SHA-256 of {count(len(files), 'weight file')}"
    return Check("bytes", summary, failures)


def count(number: int, noun: str) -> str:
    """`1 tensor`, `1,200 tensors`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _built(bundle: Path, engines: Path) -> Check:
    from exporters.tensorrt.errors import EngineError
    from exporters.tensorrt.manifest import EngineManifest

    try:
        EngineManifest.read(engines).check_bundle(bundle)
    except EngineError as error:
        return Check("bytes", "", [str(error)])
    return Check("bytes", f"{engines} was built from {bundle}")
