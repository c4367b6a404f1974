"""A tokenizer's files, extended by tokens: nothing else in them changes, and no library writes them anew."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig

from surgeon.errors import CheckpointError
from surgeon.json_file import read_object
from surgeon.side_files import TOKENIZER
from surgeon.sizes import one_line

BACKEND = "tokenizer.json"
_ADDED = "added_tokens.json"
_SPECIAL_MAP = "special_tokens_map.json"
_DECODER = "added_tokens_decoder"
_LISTS = ("additional_special_tokens", "extra_special_tokens")
"""What transformers calls the special tokens without a role: in older files, and now."""
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def load_tokenizer(directory: Path, config: PretrainedConfig) -> Any:
    """transformers' tokenizer of a directory. `config`: of the family's own class. No code in the directory is run.

    Raises CheckpointError where it cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(directory, config=config, trust_remote_code=False)
    except Exception as error:  # all of it is transformers' own, and what it trips over is the files
        raise CheckpointError(f"the tokenizer in {directory} cannot be loaded: {one_line(error)}") from error


def extend_tokenizer_files(directory: Path, tokens: Mapping[str, int], tokenizer: Any) -> int:
    """Add special tokens with their ids to the tokenizer's files in `directory`, wherever transformers reads added
    tokens there. `tokenizer`: as it was loaded from these files.

    Whether transformers then gives the tokens these ids is for `check_extended` to say. Returns the bytes written.
    Raises CheckpointError for a file that is not JSON of the kind that it should be.
    """
    names = [name for name in (BACKEND, TOKENIZER, _ADDED) if (directory / name).is_file()]
    contents = {name: read_object(directory / name, CheckpointError) for name in names}
    changed: set[str] = set()
    if BACKEND in contents:
        entries = contents[BACKEND].setdefault("added_tokens", [])
        if not isinstance(entries, list):
            raise CheckpointError(f"{directory / BACKEND}: added_tokens is no list")
        entries += [{"id": token_id, "content": token, **_FLAGS} for token, token_id in tokens.items()]
        changed.add(BACKEND)
    settings = contents.setdefault(TOKENIZER, {})
    if isinstance(settings.get(_DECODER), dict):
        settings[_DECODER] |= _decoder_entries(tokens)
        changed.add(TOKENIZER)
    if _ADDED in contents:
        contents[_ADDED] |= dict(tokens)
        changed.add(_ADDED)
    if BACKEND not in contents and _DECODER not in settings:
        changed |= _extend_older_files(directory, contents, tokens, tokenizer)
    return sum(_write(directory / name, contents[name]) for name in changed)


def _extend_older_files(
    directory: Path, contents: dict[str, dict[str, Any]], tokens: Mapping[str, int], tokenizer: Any
) -> set[str]:
    """Where the vocabulary is in vocab.json or tokenizer.model and nothing lists added tokens with all that they are.
    Returns the names of the files whose content is another one now."""
    settings = contents[TOKENIZER]
    known = {token_id: token for token_id, token in tokenizer.added_tokens_decoder.items()}
    if not (directory / _SPECIAL_MAP).is_file():
        # tokens that have no id in a file are added behind those that have one: all of them get theirs
        own = {str(token_id): _decoder_entry(str(token), token) for token_id, token in known.items()}
        settings[_DECODER] = own | _decoder_entries(tokens)
        return {TOKENIZER}
    # with a list of the one kind in tokenizer_config.json, the special tokens of the other file would not be read
    by_text = {str(token): token_id for token_id, token in known.items()}
    contents[_ADDED] = {**by_text, **contents.get(_ADDED, {}), **tokens}
    name = next((name for name in _LISTS if isinstance(settings.get(name), list)), _LISTS[1])
    settings[name] = [*settings.get(name, []), *tokens]
    return {TOKENIZER, _ADDED}


def _decoder_entries(tokens: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    return {str(token_id): {"content": token, **_FLAGS} for token, token_id in tokens.items()}


def _decoder_entry(text: str, token: Any) -> dict[str, Any]:
    return {"content": text, **{flag: bool(getattr(token, flag)) for flag in _FLAGS}}


def _write(path: Path, content: dict[str, Any]) -> int:
    try:
        return path.write_bytes((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{path} holds text that is not valid Unicode: {one_line(error)}") from error
