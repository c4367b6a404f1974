"""The tokenizer of a checkpoint, as far as passes need it to add tokens: loaded when it is first asked."""

import copy
import shutil
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from surgeon.checkpoint.reader import CONFIG, Checkpoint
from surgeon.errors import CheckpointError
from surgeon.json_file import read_object
from surgeon.memory.patched import RECORD
from surgeon.models import read_config
from surgeon.side_files import TOKENIZER_FILES
from surgeon.tokenizer_check import check_extended, ids_of_text
from surgeon.tokenizer_files import extend_tokenizer_files, load_tokenizer

_READ = (".json", ".txt", ".jinja", ".model")
"""How the files that a tokenizer is read from may end."""


class Vocabulary:
    """The tokens that a checkpoint has, and which ids new ones would get."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._extensions: dict[tuple[str, ...], dict[str, int]] = {}

    @cached_property
    def tokenizer(self) -> Any:
        """transformers'. Raises CheckpointError where there is none, or it cannot be loaded."""
        directory = self._checkpoint.directory
        if not any((directory / name).is_file() for name in TOKENIZER_FILES):
            raise CheckpointError(
                f"{directory} has no tokenizer ({' or '.join(TOKENIZER_FILES)}) to add tokens to: copy its files from "
                "the model's source"
            )
        return load_tokenizer(directory, self._plain_config)

    @cached_property
    def ids(self) -> dict[str, int]:
        """Text, as the tokenizer stores it -> id. Raises CheckpointError."""
        ids: dict[str, int] = self.tokenizer.get_vocab()
        return ids

    def spans(self) -> tuple[tuple[int, int], ...]:
        """The ids that a token has, as ranges `(first, end)`, ascending; without tokens that were added already, which
        the record knows, so that one patch of two passes and two patches agree. Raises CheckpointError."""
        spans: list[list[int]] = []
        added = (self._checkpoint.config.get(RECORD) or {}).get("tokens") or {}
        for token_id in sorted(set(self.ids.values()) - set(added.values())):
            if spans and spans[-1][1] == token_id:
                spans[-1][1] += 1
            else:
                spans.append([token_id, token_id + 1])
        return tuple((first, end) for first, end in spans)

    def token_id(self, text: str) -> int | None:
        """The id of a text that is exactly one token, None for another text. Raises CheckpointError."""
        if text in self.ids:
            return self.ids[text]
        ids = ids_of_text(self.tokenizer, text)
        return ids[0] if len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id else None

    def extended(self, tokens: Sequence[str]) -> dict[str, int]:
        """The ids that new tokens get, tried in a copy of the tokenizer's files, which are then held against the
        source's. Raises CheckpointError for a tokenizer that cannot be extended."""
        key = tuple(tokens)
        if key not in self._extensions:
            self._extensions[key] = self._try(key)
        return self._extensions[key]

    def extend_files(self, directory: Path, tokens: Sequence[str]) -> int:
        """Extend the tokenizer's files in `directory`, which are copies of the checkpoint's, and check them by loading
        them. Returns the bytes written. Raises CheckpointError, as `extended`."""
        ids = self.extended(tokens)
        count = extend_tokenizer_files(directory, ids, self.tokenizer)
        check_extended(self.tokenizer, load_tokenizer(directory, self._plain_config), ids)
        return count

    @property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json; empty where there is none. Raises CheckpointError."""
        path = self._checkpoint.directory / "generation_config.json"
        return read_object(path, CheckpointError) if path.is_file() else {}

    @cached_property
    def _plain_config(self) -> Any:
        return read_config(self._checkpoint.config, plain=True)

    def _try(self, tokens: tuple[str, ...]) -> dict[str, int]:
        """As `extended`."""
        enlarged = copy.deepcopy(self.tokenizer)
        enlarged.add_tokens(list(tokens), special_tokens=True)
        ids = {token: int(enlarged.convert_tokens_to_ids(token)) for token in tokens}
        with tempfile.TemporaryDirectory(prefix="surgeon-tokenizer-") as name:
            for file in self._checkpoint.side_files:
                if file.suffix in _READ and file.name != CONFIG:
                    shutil.copyfile(file, Path(name) / file.name)
            try:
                extend_tokenizer_files(Path(name), ids, self.tokenizer)
                check_extended(self.tokenizer, load_tokenizer(Path(name), self._plain_config), ids)
            except CheckpointError as error:
                reason = str(error).replace(f"{name}/", "").replace(name, "the copy")
                raise CheckpointError(
                    f"the tokenizer in {self._checkpoint.directory} cannot be extended by these tokens: {reason}"
                ) from error
        return ids
