"""README.md of a checkpoint that this tool writes, patched or imported: its model card."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from surgeon.card_parts import (
    TOOL,
    card,
    facts,
    grafts_text,
    has_any,
    license_text,
    linked,
    listed,
    made_by,
    methods,
    options_text,
    parameters_text,
    short_name,
    tags,
    tiles_differ,
)
from surgeon.checkpoint.reader import Checkpoint
from surgeon.errors import CheckpointError
from surgeon.grafts import asks_for_patched_class
from surgeon.json_file import read_object
from surgeon.markdown import code, command, commands, fenced, plain
from surgeon.memory.patched import MODEL_TYPE_PREFIX
from surgeon.pipeline import Pass
from surgeon.recipe import FILE_NAME, argument_of, parse_argument
from surgeon.side_files import IMAGE_PROCESSOR_FILES, TOKENIZER_FILES
from surgeon.source_card import SourceCard
from surgeon.token_card import MEMORY_TOKENS, effect_of_tokens, tokens_section
from surgeon.version import __version__

_SAME_LOGITS = (
    "the logits are the source's, bit for bit, on the same device, in the same dtype and with the same attention "
    "implementation"
)
_LOAD = """\
{imports}from transformers import {classes}

checkpoint = "OUT"  # the directory of this file, or its id on the Hub
model = AutoModelForImageTextToText.from_pretrained(checkpoint{trust})
"""
_ASK = """\
processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=False)

image = Image.open("image.png")
content = [{"type": "image", "image": image}, {"type": "text", "text": "Describe the image."}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
output = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
_TILE_IMPORTS = "from surgeon.inputs import Inputs, Prompt\n"
_ASK_WITH_TILES = """\
prepared = Inputs.from_directory(checkpoint)
inputs = prepared.prepare([Prompt("Describe the image.", ("image.png",))]).model_kwargs()
output = model.generate(**inputs, max_new_tokens=64)
print(prepared.decode(output[0, inputs["input_ids"].shape[1] :].tolist()))
"""


@dataclass(frozen=True)
class Patch:
    """What a patch did. before: the record that the source had. record, model: of the patched checkpoint. passes: those
    that were run. closed: whether every gate of the new grafts is zero. other_images: whether the image processor is
    another one than the source's."""

    source: Checkpoint
    before: Mapping[str, Any]
    record: Mapping[str, Any]
    model: PreTrainedModel
    passes: Sequence[Pass]
    seed: int
    trust_remote_code: bool
    closed: bool
    other_images: bool

    @property
    def applied(self) -> list[tuple[str, dict[str, Any]]]:
        """Name and options of the recorded passes that the source did not have."""
        entries = self.record["passes"][len(self.before.get("passes", [])) :]
        return [(name, options) for entry in entries for name, options in entry.items()]

    @property
    def new_grafts(self) -> list[dict[str, Any]]:
        """The recorded grafts that the source did not have."""
        return list(self.record["grafts"][len(self.before.get("grafts", [])) :])

    @property
    def new_tokens(self) -> dict[str, int]:
        """The recorded tokens that the source did not have."""
        known = self.before.get("tokens") or {}
        return {token: number for token, number in (self.record.get("tokens") or {}).items() if token not in known}

    @property
    def other_tokens(self) -> bool:
        """Whether the model is asked with other tokens than the source: the tiles of an image go into its memory
        alone."""
        return self.record.get("allocation") == "memory" != self.before.get("allocation")


def patched_card(patch: Patch, directory: Path) -> str:
    """README.md of a checkpoint that `surgeon patch` writes; its other files are in `directory` already."""
    source = SourceCard.read(patch.source, directory)
    names = [name for name, _ in patch.applied]
    had = f", which had {listed(methods(patch.before))} already," if methods(patch.before) else ""
    new = "; the parameters of the new grafts are beside them, in a file of their own" if patch.new_grafts else ""
    kept = "Every tensor of the source is in it, unchanged"
    if patch.new_tokens:
        kept += ", but for the rows of the new tokens in the embeddings and the head"
    sections = [
        f"# {plain(short_name(patch.source))} with {plain(', '.join(methods(patch.record)))}",
        f"{linked(patch.source)}{had} patched with {listed(names)} by {TOOL}. {kept}{new}.",
        *_effect_on_answers(patch),
        "## What was done",
        facts(patch.source, patch.record["source"]["fingerprint"], patch.model.config.model_type),
        "The passes, in their order:",
        _passes(patch),
        *tokens_section(patch.new_tokens, patch.record),
        "## Parameters",
        parameters_text(patch.model),
        "## Recipe",
        *_recipe(patch),
        "## Use",
        *_use(patch.record, directory),
        "## Validation",
        *_validation(patch),
        *license_text(source, kept=True),
    ]
    return card(source, "transformers", tags(patch.record), sections)


def imported_card(
    source: Checkpoint,
    layout: str,
    model: PreTrainedModel,
    record: Mapping[str, Any] | None,
    image_token_id: int | None,
    directory: Path,
) -> str:
    """README.md of a checkpoint that `surgeon import` writes; its other files, but for the weights, are in `directory`
    already. layout: the source's. record: None for a plain model. image_token_id: as it was asked for."""
    source_card = SourceCard.read(source, directory)
    model_type = model.config.model_type.removeprefix(MODEL_TYPE_PREFIX)
    option = [] if image_token_id is None else ["--image-token-id", str(image_token_id)]
    grafts = [] if record is None else ["Beside a plain backbone it has:", grafts_text(record)]
    sections = [
        f"# {plain(short_name(source))} in transformers' layout",
        f"{linked(source)}, converted from the layout {code(layout)} to transformers' own {code(model_type)} by "
        f"{TOOL}. Its values and dtypes are the source's.",
        "## What was done",
        facts(source, source.fingerprint(), model_type),
        *grafts,
        "## Parameters",
        parameters_text(model),
        "## Recipe",
        commands(command("import", [source.name, "OUT"], *option)),
        "## Use",
        *_use(record, directory),
        "## Validation",
        "Each tensor of the source had to have its place in the converted model, and each place its tensor. The "
        "source's own code was not run, so logits were not compared with it, and nothing was evaluated.",
        *license_text(source_card, kept=True),
    ]
    return card(source_card, "transformers", tags(record or {}), sections)


def _effect_on_answers(patch: Patch) -> list[str]:
    """How its answers relate to the source's, as far as the passes promise."""
    applied = {name for name, _ in patch.applied}
    changing = [each.name for each in patch.passes if each.name in applied and not each.identity]
    same = not changing and not patch.other_tokens
    paragraphs = []
    if patch.new_grafts:
        kinds = listed(dict.fromkeys(entry["kind"] for entry in patch.new_grafts))
        gates = "Not all of their gates are zero, so they change answers from the start."
        if patch.closed:
            gates = "Their gates are zero, as `surgeon patch` wrote them, and until they are tuned they are an identity"
            gates += f"{': ' + _SAME_LOGITS if same else ''}. To tune them alone: `surgeon.unfreeze_grafts(model)`."
        paragraphs.append(f"**The new grafts ({kinds}) are not trained.** {gates}")
    if patch.new_tokens:
        paragraphs.append(effect_of_tokens([options for name, options in patch.applied if name == MEMORY_TOKENS]))
    if patch.record.get("vismem") and not patch.before.get("vismem"):
        paragraphs.append(
            "**What forms memory (vismem) is not trained.** Nothing of it runs unless the model emits an invoke token, "
            f'and with `generate(..., memory="off")` it never does{": " + _SAME_LOGITS if same else ""}. '
            '`memory="auto"` is the default; `memory="always"` calls for memory at the beginning and behind each '
            "sentence."
        )
    if changing:
        paragraphs.append(f"{listed(changing)} is not an identity: it may change answers from the start.")
    if patch.other_tokens:
        paragraphs.append(
            "The tiles of an image go into the memory alone: the model is asked with fewer tokens than its source, and "
            "answers about such images are others from the start."
        )
    return paragraphs


def _passes(patch: Patch) -> str:
    before = [(name, options) for entry in patch.before.get("passes", []) for name, options in entry.items()]
    summaries = {each.name: plain(each.summary) for each in patch.passes}
    lines = [f"1. {code(name)}, which the source had already: {options_text(options)}" for name, options in before]
    lines += [f"1. {code(name)} ({summaries[name]}): {options_text(options)}" for name, options in patch.applied]
    return "\n".join(lines)


def _recipe(patch: Patch) -> list[str]:
    arguments = _arguments(patch)
    words = ["--recipe", FILE_NAME] if arguments is None else [w for each in arguments for w in ("--pass", each)]
    words += ["--seed", str(patch.seed), *(["--trust-remote-code"] if patch.trust_remote_code else [])]
    earlier = made_by(patch.source)
    text = (
        f"The passes are also in [{FILE_NAME}]({FILE_NAME}). New values are a function of the seed and of the "
        f"parameter's name alone: of the same source, surgeon {__version__} writes the same bytes again."
    )
    if patch.before.get("passes") and not earlier:
        text += " How the source was made is in its own card."
    return [commands(*earlier, command("patch", [patch.source.name, "OUT"], *words)), text]


def _arguments(patch: Patch) -> list[str] | None:
    """The `--pass` of each pass that was applied; None where one cannot be said in that form."""
    classes = {each.name: type(each).Options for each in patch.passes}
    arguments = []
    for name, options in patch.applied:
        argument = argument_of(name, options)
        if argument is None:
            return None
        try:
            parsed = classes[name](**parse_argument(argument)[name] or {})
        except ValueError:  # pydantic's: an option that is not read from text
            return None
        if parsed.model_dump() != classes[name](**options).model_dump():
            return None
        arguments.append(argument)
    return arguments


def _use(record: Mapping[str, Any] | None, directory: Path) -> list[str]:
    """How it is loaded and asked, with what lies beside it."""
    prompted, own_class = has_processor(directory), asks_for_patched_class(record)
    tiles = record is not None and tiles_differ(record)
    with_processor = prompted and not tiles
    snippet = _LOAD.format(
        imports="from PIL import Image\n" if with_processor else _TILE_IMPORTS if prompted else "",
        classes=", ".join(["AutoModelForImageTextToText", *(["AutoProcessor"] if with_processor else [])]),
        trust=", trust_remote_code=True" if own_class else "",
    )
    if prompted:
        snippet += f"\n{_ASK_WITH_TILES}" if tiles else _ASK
    sections = [fenced(snippet, "python")]
    if tiles:
        sections.append(
            "The model needs the tile grid of each image. Without `surgeon.inputs`, pass `tile_grids`, "
            "int64 `[N, 2]`: the rows and columns of each image's tiles."
        )
    if own_class:
        sections.append(
            "`trust_remote_code=True` runs the Python files of this directory, which surgeon wrote. Where surgeon is "
            "installed, `surgeon.load(checkpoint)` loads the model and runs none of them."
        )
    if with_processor:
        sections.append("`AutoProcessor` needs torchvision for a family with a video processor, such as Qwen-VL.")
    if prompted:
        generate_command = command("generate", ["OUT"], "--image", "image.png", "--prompt", "Describe the image.")
        sections.append(f"With surgeon's command:\n\n{commands(generate_command)}")
    else:
        sections.append(
            "It cannot be prompted as it is: a tokenizer, a chat template or an image processor is missing, as it is "
            "beside the source."
        )
    return sections


def has_processor(directory: Path) -> bool:
    """Whether everything that prompts need is here."""
    template = has_any(directory, ("chat_template.jinja", "chat_template.json"))
    tokenizer = directory / "tokenizer_config.json"
    template = template or (tokenizer.is_file() and "chat_template" in read_object(tokenizer, CheckpointError))
    return template and has_any(directory, TOKENIZER_FILES) and has_any(directory, IMAGE_PROCESSOR_FILES)


def _validation(patch: Patch) -> list[str]:
    read_back = (
        "`surgeon patch` read back what it had written: the index, and each tensor's dtype and shape against the "
        "config. Logits were not compared, and nothing was evaluated."
    )
    if patch.other_tokens or patch.other_images:
        return [
            f"{read_back} The model is asked with other tokens or images than its source, so it is compared with its "
            "own exports:",
            commands(command("validate", ["OUT", "BUNDLE"])),
        ]
    tuned = ", `--grafts-tuned` where grafts that the source had already were" if patch.before.get("grafts") else ""
    states = ["the gates of the new grafts are closed"] if patch.new_grafts else []
    states += ["memory is kept from calling"] if patch.record.get("vismem") else []
    while_so = f" while {' and '.join(states)}" if states else ""
    return [
        f"{read_back} To prove that every tensor of the source is here, and that the logits are the source's"
        f"{while_so}:",
        commands(command("validate", [patch.source.name, "OUT"])),
        "That holds before what was added is tuned and after. Add `--backbone-tuned` where the backbone was tuned "
        f"too{tuned}.",
    ]
