"""Import a checkpoint: its importer reads the config, its tensors are streamed, and the rest is written beside them."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from surgeon import __version__
from surgeon.checkpoint.publish import check_target, staged
from surgeon.checkpoint.reader import Checkpoint
from surgeon.checkpoint.share import share_file
from surgeon.checkpoint.unchanged import SourceFiles
from surgeon.errors import CheckpointError, OptionError
from surgeon.families import family
from surgeon.importers._layout import Layout
from surgeon.importers._registry import importer
from surgeon.importers._templates import IMAGE_TOKEN, Conversation, conversation
from surgeon.importers._tensors import Converted, equal, plan_tensors, write_tensors
from surgeon.importers._tokenizer import SourceTokenizer
from surgeon.models import build_meta, read_config
from surgeon.published import check_staged
from surgeon.remote_code import patched_config, write_remote_code
from surgeon.side_files import name_classes

Progress = Callable[[str, int, int], None]
"""Called with what is going on, how much is done and how much there is, in bytes."""

_KEPT_FILES = ("LICENSE", "NOTICE", "USE_POLICY")
_TOKENS_ADDED = 9
_IMAGE_TOKEN_PLACE = 2


@dataclass
class ImportReport:
    """What an import made."""

    source_type: str
    model_type: str
    text_model: str
    """The kind of text model in the source."""
    parameters: int
    tensors: int
    bytes_written: int
    image_token_id: int
    grafts: dict[str, list[int]] = field(default_factory=dict)
    """Kind of graft -> the layers that have one."""
    warnings: list[str] = field(default_factory=list)


def import_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    image_token_id: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ImportReport:
    """Write a checkpoint of another layout as one that transformers loads itself: complete or not there at all.

    No code in the checkpoint is run. Weights keep their dtype and their distribution over files, and are streamed: one
    tensor is in memory at a time. `image_token_id` is for a checkpoint without a tokenizer, which says it otherwise.
    Raises CheckpointError for what cannot be converted exactly (a tensor that is left over or missing, with its name),
    OptionError for a token id that cannot be, TargetError; nothing is left behind then.
    """
    with Checkpoint.open(source) as checkpoint:
        files = SourceFiles.of_checkpoint(checkpoint)
        check_target(Path(target), overwrite, [checkpoint.directory])
        read = importer(checkpoint.config["model_type"])
        tokenizer = SourceTokenizer.read(checkpoint.directory)
        warnings: list[str] = []
        token_id = _image_token_id(checkpoint.config, tokenizer, image_token_id, warnings)
        layout = read(checkpoint.config, token_id)
        config = _config(layout, checkpoint)
        planned = _plan(checkpoint, layout, config)
        report = ImportReport(
            source_type=checkpoint.config["model_type"],
            model_type=config["model_type"],
            text_model=layout.text_model,
            parameters=sum(prod(each.shape) for each in planned),
            tensors=len(planned),
            bytes_written=0,
            image_token_id=token_id,
            grafts={entry["kind"]: entry["layers"] for entry in (layout.record or {}).get("grafts", [])},
            warnings=[*warnings, *layout.warnings],
        )
        needed = sum(each.nbytes for each in planned)

        def verify(directory: Path) -> None:
            files.check()
            check_staged(directory, {each.name: (each.source.torch_dtype, each.shape) for each in planned})

        with staged(Path(target), overwrite, [checkpoint.directory], needed, verify) as directory:
            # What may fail goes before what takes long.
            _write_files(directory, checkpoint, layout, config, tokenizer, report)
            report.bytes_written = sum(path.stat().st_size for path in directory.iterdir())
            report.bytes_written += write_tensors(checkpoint, planned, directory, progress)
    return report


def _image_token_id(
    config: dict[str, Any], tokenizer: SourceTokenizer | None, asked: int | None, warnings: list[str]
) -> int:
    """The id of the token that pictures take the place of. Only the tokenizer knows; without one it is asked for, or
    the place that it has in every published checkpoint."""
    llm = config.get("llm_config")
    size = llm.get("vocab_size") if isinstance(llm, dict) else None
    if type(size) is not int:
        raise CheckpointError("vocab_size is missing in llm_config of config.json")
    if asked is not None and not 0 <= asked < size:
        raise OptionError(f"image token id {asked} is outside the vocabulary of {size}")
    if tokenizer is not None:
        found = tokenizer.token_id(IMAGE_TOKEN)
        if found is None or found >= size:
            what = "has no" if found is None else f"gives id {found}, outside the vocabulary of {size}, to"
            raise CheckpointError(f"the tokenizer {what} {IMAGE_TOKEN}, the token that pictures take the place of")
        if asked is not None and asked != found:
            raise OptionError(f"image token id {asked} was asked for, and the tokenizer gives {IMAGE_TOKEN} id {found}")
        return found
    without = "the checkpoint has no tokenizer, so the imported one has none"
    if asked is not None:
        warnings.append(f"{without}: add one that gives {IMAGE_TOKEN} id {asked} before prompting it")
        return asked
    # Training adds nine tokens to the text model's: <img>, </img>, <IMG_CONTEXT>, and three more pairs.
    guessed = size - _TOKENS_ADDED + _IMAGE_TOKEN_PLACE
    warnings.append(
        f"{without}: add one before prompting it; image_token_id is taken to be {guessed}, where published checkpoints "
        f"of this vocabulary size have {IMAGE_TOKEN} (name another with --image-token-id)"
    )
    return guessed


def _config(layout: Layout, source: Checkpoint) -> dict[str, Any]:
    """config.json of the target."""
    if layout.record is None:
        return layout.config
    origin = {
        "name": source.directory.resolve().name,
        "model_type": source.config["model_type"],
        "fingerprint": source.fingerprint(),
    }
    record = {**layout.record, "version": __version__, "source": origin}
    return patched_config(layout.config, layout.config["model_type"], record)


def _plan(source: Checkpoint, layout: Layout, config: dict[str, Any]) -> list[Converted]:
    """The target's tensors. A tied output layer that the source stores as well is left out."""
    try:
        model = build_meta(read_config(config))
    except (ValueError, KeyError, TypeError) as error:  # sizes that do not divide, an activation that is not there
        reason = " ".join(str(error).split())
        raise CheckpointError(f"no model can be made of config.json: {type(error).__name__}: {reason}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied: dict[str, str] = model.all_tied_weights_keys
    stored = {rule_target for info in source.tensors for rule_target in _names(layout, info)}
    absent = {name for name, other in tied.items() if name not in stored and other in stored}
    planned = plan_tensors(
        source.tensors, layout.rules, {name: shape for name, shape in expected.items() if name not in absent}
    )
    by_name = {each.name: each.source.name for each in planned}
    doubled = {name for name, other in tied.items() if name in by_name and other in by_name}
    for name in sorted(doubled):
        first, second = by_name[tied[name]], by_name[name]
        if not equal(source, first, second):
            raise CheckpointError(f"tie_word_embeddings is on in config.json, and {first} and {second} are different")
    return [each for each in planned if each.name not in doubled]


def _names(layout: Layout, key: str) -> list[str]:
    """The target names that a source tensor has rules for."""
    return [
        match.expand(target)
        for rule in layout.rules
        if (match := rule.pattern.fullmatch(key))
        for target in rule.targets
    ]


def _write_files(
    directory: Path,
    source: Checkpoint,
    layout: Layout,
    config: dict[str, Any],
    tokenizer: SourceTokenizer | None,
    report: ImportReport,
) -> None:
    """Everything but the weights."""
    _write_json(directory / "config.json", config)
    if layout.record is not None:
        write_remote_code(directory, read_config(config))
    found = conversation(source.directory, layout.template)
    _write_json(directory / "generation_config.json", _generation_config(source, config, tokenizer, found))
    _write_json(directory / "preprocessor_config.json", layout.image_processor)
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": config["image_seq_length"]}
    _write_json(directory / "processor_config.json", processor)
    if tokenizer is not None:
        if found is None:
            report.warnings.append(
                f"conversation template {layout.template!r} is not known, so there is no chat template: write a "
                f"chat_template.jinja that puts {IMAGE_TOKEN} for each picture"
            )
        tokenizer.write(directory, found)
    for file in source.side_files:
        if file.name.upper().startswith(_KEPT_FILES):
            share_file(file, directory / file.name, "copy")
    name_classes(directory, family(config["model_type"]))


def _generation_config(
    source: Checkpoint, config: dict[str, Any], tokenizer: SourceTokenizer | None, found: Conversation | None
) -> dict[str, Any]:
    """The source's, and the end of a turn among what ends an answer: the published code names it at each request."""
    path = source.directory / "generation_config.json"
    given: dict[str, Any] = {}
    if path.is_file():
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{path} is not JSON: {error}") from error
    text = config["text_config"]
    ends: Any = given.get("eos_token_id", text.get("eos_token_id"))
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    turn_end = tokenizer.token_id(found.end.strip()) if tokenizer and found else None
    if turn_end is not None and turn_end not in ends:
        ends = [turn_end, *ends]
    tokens = {key: given.get(key, text.get(key)) for key in ("bos_token_id", "pad_token_id")}
    kept = {key: value for key, value in given.items() if key not in ("_from_model_config", "transformers_version")}
    generation = {**kept, **tokens, "eos_token_id": ends}
    return {key: value for key, value in generation.items() if value is not None and value != []}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
