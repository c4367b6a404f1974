"""What stands beside the weights of an InternVL as published, as transformers' processor of internvl wants it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgeon.checkpoint.reader import Checkpoint
from surgeon.errors import CheckpointError, OptionError
from surgeon.importers._templates import IMAGE_TOKEN, Conversation, conversation
from surgeon.importers._tokenizer import SourceTokenizer
from surgeon.json_file import read_object
from surgeon.side_files import copy_license_files

_TOKENS_ADDED = 9
_IMAGE_TOKEN_PLACE = 2


@dataclass
class InternVLFiles:
    """The tokenizer, chat template and image processor of a published InternVL."""

    source: Checkpoint
    tokenizer: SourceTokenizer | None
    image_token_id: int
    warnings: list[str] = field(default_factory=list)
    """What reading them had to suppose."""
    image_processor: dict[str, Any] = field(default_factory=dict)
    """preprocessor_config.json."""
    template: str | None = None
    """Name of the conversation template that the model was trained with."""

    @classmethod
    def read(cls, source: Checkpoint, image_token_id: int | None) -> "InternVLFiles":
        """The files of a checkpoint directory. `image_token_id`: as asked for, None where it was not.

        Raises CheckpointError for a tokenizer that is damaged or not InternVL's, OptionError for a token id that cannot
        be.
        """
        tokenizer = SourceTokenizer.read(source.directory)
        warnings: list[str] = []
        return cls(source, tokenizer, _image_token_id(source.config, tokenizer, image_token_id, warnings), warnings)

    def write(self, directory: Path, config: dict[str, Any]) -> list[str]:
        """As `SideFiles.write`."""
        warnings: list[str] = []
        published = conversation(self.source.directory, self.template)
        _write_json(directory / "generation_config.json", self._generation_config(config, published))
        _write_json(directory / "preprocessor_config.json", self.image_processor)
        processor = {"processor_class": "InternVLProcessor", "image_seq_length": config["image_seq_length"]}
        _write_json(directory / "processor_config.json", processor)
        if self.tokenizer is not None:
            if published is None:
                warnings.append(
                    f"conversation template {self.template!r} is not known, so there is no chat template: write a "
                    f"chat_template.jinja that puts {IMAGE_TOKEN} for each image"
                )
            self.tokenizer.write(directory, published)
        copy_license_files(self.source, directory)
        return warnings

    def _generation_config(self, config: dict[str, Any], published: Conversation | None) -> dict[str, Any]:
        """The source's, and the end of a turn among what ends an answer: the published code names it at each
        request."""
        path = self.source.directory / "generation_config.json"
        settings = read_object(path, CheckpointError) if path.is_file() else {}
        text = config["text_config"]
        ends: Any = settings.get("eos_token_id", text.get("eos_token_id"))
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        turn_end = self.tokenizer.token_id(published.end.strip()) if self.tokenizer and published else None
        if turn_end is not None and turn_end not in ends:
            ends = [turn_end, *ends]
        tokens = {key: settings.get(key, text.get(key)) for key in ("bos_token_id", "pad_token_id")}
        inherited = {
            key: value for key, value in settings.items() if key not in ("_from_model_config", "transformers_version")
        }
        generation = {**inherited, **tokens, "eos_token_id": ends}
        return {key: value for key, value in generation.items() if value is not None and value != []}


def _image_token_id(
    config: dict[str, Any], tokenizer: SourceTokenizer | None, requested_id: int | None, warnings: list[str]
) -> int:
    """The id of the token that images take the place of. Only the tokenizer knows; without one it is asked for, or
    the place that it has in every published checkpoint."""
    llm = config.get("llm_config")
    size = llm.get("vocab_size") if isinstance(llm, dict) else None
    if type(size) is not int:
        raise CheckpointError("vocab_size is missing in llm_config of config.json")
    if requested_id is not None and not 0 <= requested_id < size:
        raise OptionError(f"image token id {requested_id} is outside the vocabulary of {size}")
    if tokenizer is not None:
        token_id = tokenizer.token_id(IMAGE_TOKEN)
        if token_id is None or token_id >= size:
            verb = "has no" if token_id is None else f"gives id {token_id}, outside the vocabulary of {size}, to"
            raise CheckpointError(f"the tokenizer {verb} {IMAGE_TOKEN}, the token that images take the place of")
        if requested_id is not None and requested_id != token_id:
            raise OptionError(
                f"image token id {requested_id} was asked for, and the tokenizer gives {IMAGE_TOKEN} id {token_id}"
            )
        return token_id
    no_tokenizer = "the checkpoint has no tokenizer, so the imported one has none"
    if requested_id is not None:
        warnings.append(f"{no_tokenizer}: add one that gives {IMAGE_TOKEN} id {requested_id} before prompting it")
        return requested_id
    # Training adds nine tokens to the text model's: <img>, </img>, <IMG_CONTEXT>, and three more pairs.
    inferred_id = size - _TOKENS_ADDED + _IMAGE_TOKEN_PLACE
    warnings.append(
        f"{no_tokenizer}: add one before prompting it; image_token_id is taken to be {inferred_id}, where published "
        f"checkpoints of this vocabulary size have {IMAGE_TOKEN} (name another with --image-token-id)"
    )
    return inferred_id


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
