"""README.md of a bundle: its model card, as the Hugging Face Hub shows it."""

from collections.abc import Collection
from pathlib import Path

import onnx

from exporters.onnx.manifest import FILE, NOT_ASKED, PROCESSOR, Manifest
from surgeon.card_parts import (
    TOOL,
    card,
    facts,
    grafts_text,
    license_text,
    linked,
    made_by,
    methods,
    short_name,
    tags,
    tiles_differ,
    untrained,
)
from surgeon.checkpoint import Checkpoint
from surgeon.dtypes import PRECISIONS, name_of
from surgeon.markdown import code, command, commands, fenced, plain, table
from surgeon.memory.patched import RECORD
from surgeon.model_card import has_processor
from surgeon.source_card import SourceCard

_ASK = """\
import surgeon

print(surgeon.generate("BUNDLE", "Describe the image.", ["image.png"], max_new_tokens=64).text)
"""
_EXPORT = """\
from pathlib import Path

import surgeon
import torch

surgeon.export({source!r}, Path("BUNDLE"), dtype=torch.{dtype}, {options})
"""


def bundle_card(checkpoint: Checkpoint, manifest: Manifest, directory: Path, graphs: Collection[str] | None) -> str:
    """README.md of the bundle in `directory`, whose other files are there already. graphs: as they were asked for, None
    for all."""
    source = SourceCard.read(checkpoint, directory)
    record = checkpoint.config.get(RECORD) or {}
    grafted = f" with {plain(', '.join(methods(record)))}" if record else ""
    earlier = made_by(checkpoint)
    sections = [
        f"# {plain(short_name(checkpoint))}{grafted} in ONNX, {_short(manifest)}",
        f"{linked(checkpoint)} as ONNX graphs, exported by {TOOL}. [{FILE}]({FILE}) describes every input, output, "
        "token id and file for whoever writes a runtime.",
        *_untrained(checkpoint),
        "## What is in it",
        facts(
            checkpoint,
            manifest.source.fingerprint,
            manifest.source.model_type,
            ("dtype", manifest.dtype),
            ("max_length", f"{manifest.max_length:,} tokens: prompt, images and answer together"),
            ("opset", _opsets(manifest, directory)),
        ),
        *(["Beside a plain backbone it has:", grafts_text(record)] if record else []),
        _graphs(manifest),
        _weights(manifest),
        *_precision(manifest),
        "## Use",
        *_use(manifest, directory),
        _runtimes(manifest),
        "## Recipe",
        *(["The checkpoint was patched, and the bundle exported, by:"] if earlier else []),
        *_recipe(checkpoint, manifest, graphs, earlier),
        "## Validation",
        *_validation(checkpoint, manifest),
        *license_text(source, kept=False),
    ]
    return card(source, "onnx", [*tags(record), "onnx"], sections)


def _short(manifest: Manifest) -> str:
    """The dtype as the command has it."""
    return next(short for short, dtype in PRECISIONS.items() if name_of(dtype) == manifest.dtype)


def _untrained(checkpoint: Checkpoint) -> list[str]:
    if not untrained(checkpoint):
        return []
    identity = "they are an identity: the bundle computes what the model without them does"
    nothing = "they add nothing" if tiles_differ(checkpoint.config.get(RECORD) or {}) else identity
    return [
        f"**Its grafts are not trained.** Every gate is zero, so {nothing}. Tune the checkpoint and export it again."
    ]


def _use(manifest: Manifest, directory: Path) -> list[str]:
    if not {"embed", "decoder"} <= manifest.graphs.keys():
        return ["It has some of a model's graphs alone: they are for a runtime of your own."]
    if not has_processor(directory / PROCESSOR):
        return ["It has no tokenizer or image processor: copy them into `processor/` before you ask it anything."]
    return [
        "With surgeon installed; ONNX Runtime computes it, on CUDA where that works and else on the CPU:",
        commands(command("generate", ["BUNDLE"], "--image", "image.png", "--prompt", "Describe the image.")),
        fenced(_ASK, "python"),
    ]


def _opsets(manifest: Manifest, directory: Path) -> str:
    versions = {
        (entry.domain or "ai.onnx", entry.version)
        for graph in manifest.graphs.values()
        for entry in onnx.load(directory / graph.file, load_external_data=False).opset_import
    }
    return ", ".join(f"{domain} {version}" for domain, version in sorted(versions))


def _graphs(manifest: Manifest) -> str:
    def ports(names: Collection[str]) -> str:
        first = ", ".join(map(code, [*names][:6]))
        return first if len(names) <= 6 else f"{first} and {len(names) - 6} more"

    rows = [
        (code(graph.file), ports([port.name for port in graph.inputs]), ports([port.name for port in graph.outputs]))
        for graph in manifest.graphs.values()
    ]
    return table(("graph", "inputs", "outputs"), rows)


def _weights(manifest: Manifest) -> str:
    rows = [
        (code(path), f"{file.bytes:,}", f"converted to {manifest.dtype}" if file.how == "converted" else "as it was")
        for path, file in manifest.weights.items()
    ]
    return table(("weights", "bytes", "the checkpoint's file"), rows)


def _precision(manifest: Manifest) -> list[str]:
    precision = manifest.precision
    if precision is None:
        return []
    if precision.skipped is not None:
        return [f"What overflows fp16 was not measured; `precision` in {FILE} says why."]
    widened = len({(activation.graph, activation.layer) for activation in precision.widened})
    widening = {0: "no layer needs fp32", 1: "1 layer computes in fp32"}.get(
        widened, f"{widened} layers compute in fp32"
    )
    return [
        f"What overflows fp16 was measured over {precision.prompts} prompts, with a margin of {precision.margin:g}: "
        f"{widening} for that. `precision` in {FILE} has the values."
    ]


def _runtimes(manifest: Manifest) -> str:
    lines = []
    if manifest.dtype == "bfloat16":
        lines.append(
            "- ONNX Runtime's CPU provider has no bf16 kernels: there surgeon runs the graphs in fp32 and rounds every "
            "result to bf16, which shows a bf16 device's numbers, not its speed."
        )
    if manifest.dtype == "float32":
        lines.append("- TensorRT engines are built from fp16 and bf16 bundles, not from fp32 ones.")
    else:
        lines.append(
            "- TensorRT and TensorRT for RTX: `surgeon engine BUNDLE ENGINES` builds engines for the GPU that is here, "
            "or for those that `--target` names."
        )
    lines.append(
        "- Other runtimes: the operators are standard ONNX, and functions of the domain `surgeon` carry their own "
        "definition in them."
    )
    return "\n".join(lines)


def _recipe(
    checkpoint: Checkpoint, manifest: Manifest, graphs: Collection[str] | None, earlier: list[list[str]]
) -> list[str]:
    digests = all(file.sha256 is not None for file in manifest.weights.values())
    measured = manifest.precision is None or manifest.precision.skipped != NOT_ASKED
    if graphs is None:
        options = ["--dtype", _short(manifest), "--max-length", str(manifest.max_length)]
        options += [*([] if measured else ["--no-measure"]), *([] if digests else ["--no-digests"])]
        return [commands(*earlier, command("export", [checkpoint.name, "BUNDLE"], *options))]
    arguments = [f"max_length={manifest.max_length}", f"graphs={sorted(graphs)}"]
    arguments += [*([] if measured else ["measure=False"]), *([] if digests else ["digests=False"])]
    python = _EXPORT.format(source=checkpoint.name, dtype=manifest.dtype, options=", ".join(arguments))
    return [*([commands(*earlier)] if earlier else []), fenced(python, "python")]


def _validation(checkpoint: Checkpoint, manifest: Manifest) -> list[str]:
    digests = all(file.sha256 is not None for file in manifest.weights.values())
    recorded = ["graphs", *(["weights"] if digests else []), f"the files of `{PROCESSOR}/`"]
    paragraphs = [
        "`surgeon export` checked each graph with `onnx.checker`, and that whatever a graph takes from a weight file "
        "is a whole tensor of it. It compared no logits, and evaluated nothing. To compare logits and greedy tokens "
        "with the checkpoint's:",
        commands(command("validate", [checkpoint.name, "BUNDLE"])),
        f"{FILE} records the SHA-256 of {', '.join(recorded[:-1])} and {recorded[-1]}.",
    ]
    if digests:
        paragraphs[-1] += " To compare every file with it:"
        paragraphs.append(commands(command("validate", ["BUNDLE"], "--bytes")))
    return paragraphs
