"""A bundle: a checkpoint's ONNX graphs, the weight files they point into, and what a runtime needs beside them."""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from transformers import PretrainedConfig

from exporters.onnx import manifest as manifests
from exporters.onnx.decoder import decoder_graph
from exporters.onnx.digests import sha256_of_files
from exporters.onnx.embed import embed_graph
from exporters.onnx.external_data import check_external_data
from exporters.onnx.formers import LONG_FORMER, QUERY_BUILDER, SHORT_FORMER, former_graphs
from exporters.onnx.graph_file import ports_of
from exporters.onnx.manifest import (
    PROCESSOR,
    GraphFile,
    Manifest,
    MemoryEntry,
    Precision,
    Sizes,
    Source,
    Tokens,
    WeightFile,
)
from exporters.onnx.memory import memory_entries, memory_graph
from exporters.onnx.model_card import bundle_card
from exporters.onnx.precision.policy import Float32Operators
from exporters.onnx.rope import num_position_axes
from exporters.onnx.vision import vision_graph
from exporters.onnx.weights import bind
from surgeon.checkpoint import Checkpoint, SourceFiles, share_file, staged
from surgeon.dtypes import PRECISIONS, name_of
from surgeon.errors import CheckpointError, OptionError
from surgeon.families import Family, family
from surgeon.grafts import graft_records
from surgeon.json_file import read_object
from surgeon.memory.visibility import visibility_of
from surgeon.models import StoredModel, read_model
from surgeon.positions import record_of
from surgeon.progress import Progress
from surgeon.side_files import copy_license_files
from surgeon.sizes import GenerationTokens, check
from surgeon.source_card import README
from surgeon.version import __version__

GRAPHS = ("embed", "vision", "memory", "decoder", QUERY_BUILDER, SHORT_FORMER, LONG_FORMER)

_SHORTEST = 2
"""Tokens of a cache that holds a prompt and what follows it."""
_PROCESSOR_SUFFIXES = (".json", ".jinja", ".txt", ".model")


Calibrate = Callable[[Path, Progress | None], tuple[Precision, Mapping[str, ir.Model]]]
"""An fp16 bundle -> what of it has to be fp32, and the graphs that had to change for that, by name."""


def write_bundle(
    checkpoint: str | Path,
    target: Path,
    *,
    dtype: torch.dtype | str,
    max_length: int,
    calibrate: Calibrate,
    overwrite: bool = False,
    progress: Progress | None = None,
    graphs: Collection[str] | None = None,
    digests: bool = True,
) -> Manifest:
    """Write the graphs of a checkpoint, and everything beside them, to a new directory `target`; -> its manifest.
    Arguments as those of `exporters.export.export_bundle`; `calibrate` is called with a bundle of fp16.

    Raises OptionError for a dtype, length or graph that cannot be, CheckpointError and FamilyError for the checkpoint,
    BundleError for a model that cannot be exported, TargetError for the target. `target` appears whole or not at all.
    """
    if isinstance(dtype, str) or dtype not in PRECISIONS.values():
        raise OptionError(f"cannot export graphs of {dtype}; choose one of {', '.join(PRECISIONS)}")
    if graphs is not None and not graphs:
        raise OptionError(f"no graph is named; there are {', '.join(GRAPHS)}")
    if unknown := set(graphs or ()) - set(GRAPHS):
        raise OptionError(f"no graph {sorted(unknown)[0]!r}; there are {', '.join(GRAPHS)}")
    with Checkpoint.open(checkpoint) as opened:
        files = SourceFiles.of_checkpoint(opened)
        stored = read_model(opened, dtype)
        model_family = family(stored.config.model_type)
        _check_length(max_length, model_family.text_config(stored.config))

        def verify(directory: Path) -> None:
            files.check()
            check_external_data(directory, Manifest.load(directory))

        with staged(target, overwrite, protect=[opened.directory], verify=verify) as directory:
            manifest = _write(opened, model_family, stored, directory, dtype, max_length, progress, graphs, digests)
            if dtype == torch.float16:
                manifest = _calibrated(directory, manifest, calibrate, progress)
            copy_license_files(opened, directory)
            card = bundle_card(opened, manifest, directory, graphs)
            (directory / README).write_text(card, encoding="utf-8")
            return manifest


def _check_length(max_length: int, text: Any) -> None:
    longest = text.max_position_embeddings
    if not _SHORTEST <= max_length <= longest:
        dynamic = text.rope_parameters["rope_type"] == "dynamic"
        reason = ", beyond which its 'dynamic' rotary frequencies change with the length" if dynamic else ""
        raise OptionError(
            f"max_length {max_length} is out of range; this model takes {_SHORTEST} to {longest} tokens{reason}"
        )


def _write(
    checkpoint: Checkpoint,
    model_family: Family,
    stored: StoredModel,
    directory: Path,
    dtype: torch.dtype,
    max_length: int,
    progress: Progress | None,
    graphs: Collection[str] | None,
    digests: bool,
) -> Manifest:
    config, model, weights = stored
    decoder: Any = model.get_submodule(model_family.text_model)
    entries = memory_entries(decoder)

    def layers(done: int, total: int) -> None:
        if progress:
            progress("tracing decoder layers", done, total)

    makers: dict[str, Callable[[], ir.Model]] = {
        "embed": lambda: embed_graph(model, dtype),
        "vision": lambda: vision_graph(model_family, model, dtype),
        "memory": lambda: memory_graph(model_family, config, model, dtype),
        "decoder": lambda: decoder_graph(model_family, config, model, dtype, max_length, layers),
    }
    if not entries:
        del makers["memory"]
    makers |= former_graphs(model_family, config, model, dtype)
    selected = [name for name in makers if graphs is None or name in graphs]
    traced_graphs: dict[str, ir.Model] = {}
    for done, name in enumerate(selected):
        if progress:
            progress("tracing graphs", done, len(selected))
        traced_graphs[name] = makers[name]()
        Float32Operators()(traced_graphs[name])
    if progress:
        progress("tracing graphs", len(selected), len(selected))

    placed = bind(traced_graphs.values(), weights, checkpoint, directory, progress)
    for name, graph in traced_graphs.items():
        _save(graph, directory / f"{name}.onnx")
    _copy_processor(checkpoint, directory / PROCESSOR)
    paths = {file.path: directory / file.path for file in placed}
    sha256 = sha256_of_files([*checkpoint.files, *paths.values()], progress) if digests else {}

    text, record = model_family.text_config(config), record_of(config)
    manifest = Manifest(
        tool_version=__version__,
        source=Source(
            name=checkpoint.name,
            fingerprint=checkpoint.fingerprint(),
            model_type=model_family.model_type,
            grafts=graft_records(config),
            sha256={file.relative_to(checkpoint.directory).as_posix(): sha256[file] for file in checkpoint.files}
            if digests
            else {},
        ),
        dtype=name_of(dtype),  # type: ignore[arg-type]  # one of the three
        max_length=max_length,
        sizes=Sizes(
            num_hidden_layers=len(decoder.layers),
            num_key_value_heads=text.num_key_value_heads,
            head_dim=model_family.head_dim(config),
            hidden_size=text.hidden_size,
            vocab_size=text.vocab_size,
            position_axes=num_position_axes(model_family, config),
            deepstack=model_family.deepstack_layers(config),
        ),
        tokens=_tokens(checkpoint, model_family, config),
        layout=record.get("layout"),
        positions=record.get("positions"),
        allocation=record.get("allocation", "both"),
        visibility=visibility_of(record),
        vismem=record.get("vismem"),
        memory=[
            MemoryEntry(layer=e.layer, kind=e.kind, num_key_value_heads=e.num_key_value_heads, head_dim=e.head_dim)
            for e in entries
        ],
        graphs={name: _describe(graph, directory / f"{name}.onnx") for name, graph in traced_graphs.items()},
        weights={
            file.path: WeightFile(
                bytes=(directory / file.path).stat().st_size,
                header_sha256=str(manifests.header_sha256(directory / file.path)),
                sha256=sha256.get(paths[file.path]),
                how=file.how,
            )
            for file in placed
        },
        processor={path.name: str(manifests.sha256(path)) for path in sorted((directory / PROCESSOR).iterdir())},
    )
    manifest.save(directory)
    return manifest


def _calibrated(directory: Path, manifest: Manifest, calibrate: Calibrate, progress: Progress | None) -> Manifest:
    """The bundle in `directory` with fp32 where its values would overflow fp16; -> its manifest."""
    precision, graphs = calibrate(directory, progress)
    graph_files = dict(manifest.graphs)
    for name, graph in graphs.items():
        path = directory / manifest.graphs[name].file
        _save(graph, path)
        graph_files[name] = _describe(graph, path)
    calibrated = manifest.model_copy(update={"precision": precision, "graphs": graph_files})
    calibrated.save(directory)
    return calibrated


def _save(graph: ir.Model, path: Path) -> None:
    ir.save(graph, path)
    # onnx.checker refuses external data in files with several hard links, which these are: they stand in as inputs
    proto = onnx.load(path, load_external_data=False)
    inline = [tensor for tensor in proto.graph.initializer if tensor.data_location != tensor.EXTERNAL]
    for tensor in proto.graph.initializer:
        if tensor.data_location == tensor.EXTERNAL:
            proto.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(inline)
    onnx.checker.check_model(proto)


def _describe(graph: ir.Model, path: Path) -> GraphFile:
    return GraphFile(
        file=path.name,
        sha256=str(manifests.sha256(path)),
        inputs=ports_of(graph.graph.inputs),
        outputs=ports_of(graph.graph.outputs),
    )


def _copy_processor(checkpoint: Checkpoint, folder: Path) -> None:
    folder.mkdir()
    for path in checkpoint.side_files:
        if path.suffix in _PROCESSOR_SUFFIXES:
            share_file(path, folder / path.name, "copy")
    (folder / "config.json").write_text(json.dumps(checkpoint.config, indent=2) + "\n")


def _tokens(checkpoint: Checkpoint, model_family: Family, config: PretrainedConfig) -> Tokens:
    """Generation's ids: those of generation_config.json, else those of the config."""
    generation: dict[str, Any] = {}
    path = checkpoint.directory / "generation_config.json"
    if path.is_file():
        generation = read_object(path, CheckpointError)
        check(GenerationTokens, generation, file=path.name)

    def lookup(key: str) -> Any:
        for value in (
            generation.get(key),
            getattr(config, key, None),
            getattr(model_family.text_config(config), key, None),
        ):
            if value is not None:
                return value
        return None

    eos = lookup("eos_token_id")
    return Tokens(
        image=model_family.image_token_id(config),
        visual=list(model_family.visual_token_ids(config)),
        indicators=list(model_family.indicator_token_ids(config)),
        eos=[] if eos is None else [eos] if isinstance(eos, int) else list(eos),
        pad=lookup("pad_token_id"),
    )
