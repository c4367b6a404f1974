"""The tokenizer of a foreign checkpoint as a tokenizer.json, which transformers loads without any code of it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from surgeon.errors import CheckpointError
from surgeon.importers._templates import IMAGE_TOKEN, Conversation
from surgeon.json_file import read_object

START_IMAGE, END_IMAGE, VIDEO = "<img>", "</img>", "<video>"
IMAGE_TOKENS = (START_IMAGE, END_IMAGE, IMAGE_TOKEN)
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
# What a tokenizer_config.json says that is still true of the converted tokenizer.
_KEPT = ("model_max_length", "clean_up_tokenization_spaces", "padding_side")


@dataclass
class SourceTokenizer:
    """The tokenizer files of a checkpoint directory, read."""

    directory: Path
    settings: dict[str, Any]
    """tokenizer_config.json."""
    added: dict[int, AddedToken]
    """Id -> token, of the tokens that are matched before the vocabulary is looked at."""

    def token_id(self, content: str) -> int | None:
        return next((i for i, token in self.added.items() if token.content == content), None)

    def name(self, key: str) -> str | None:
        """A named token ("bos_token"), None where it has none."""
        token = self.settings.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        return token if isinstance(token, str) else None

    def _has(self, name: str) -> bool:
        return (self.directory / name).is_file()

    # -- reading -------------------------------------------------------------------------------------------------
    @classmethod
    def read(cls, directory: Path) -> "SourceTokenizer | None":
        """The tokenizer in a directory, None where there is none. Raises CheckpointError for damaged files."""
        if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            return None
        settings = {**_json(directory / "special_tokens_map.json"), **_json(directory / "tokenizer_config.json")}
        tokenizer = cls(directory, settings, {})
        if tokenizer._has("tokenizer.model") and not tokenizer._has("tokenizer.json"):
            for key, default in zip(_NAMED, ("<s>", "</s>", "<unk>", "</s>"), strict=True):
                settings.setdefault(key, default)
        tokenizer._read_added()
        return tokenizer

    def _read_added(self) -> None:
        # Not left to transformers: where tokenizer_config.json lists added tokens, it does not read added_tokens.json.
        special = {self.name(key) for key in _NAMED} | set(IMAGE_TOKENS)
        for entry in self.settings.get("additional_special_tokens") or []:
            special.add(entry["content"] if isinstance(entry, dict) else str(entry))
        listed: list[dict[str, Any]] = [
            {"id": i, "content": content} for content, i in _json(self.directory / "added_tokens.json").items()
        ]
        listed += [{"id": i, **token} for i, token in (self.settings.get("added_tokens_decoder") or {}).items()]
        if self._has("tokenizer.json"):
            listed += _json(self.directory / "tokenizer.json").get("added_tokens") or []
        for entry in listed:
            try:
                i, content = int(entry["id"]), str(entry["content"])
            except (KeyError, TypeError, ValueError) as error:
                raise CheckpointError(f"{self.directory}: an added token reads {entry!r}") from error
            flags = {key: bool(entry.get(key, False)) for key in ("single_word", "lstrip", "rstrip")}
            is_special = bool(entry.get("special", False)) or content in special
            before = self.added.get(i)
            if before is not None and before.content != content:
                raise CheckpointError(
                    f"{self.directory}: the tokenizer's files give id {i} to {before.content!r} and to {content!r}"
                )
            normalized = bool(entry.get("normalized", False)) and not is_special
            self.added[i] = AddedToken(content, normalized=normalized, special=is_special, **flags)

    # -- writing -------------------------------------------------------------------------------------------------
    def convert(self) -> Tokenizer:
        """The tokenizer, with its added tokens at their ids. Raises CheckpointError where it cannot be had exactly."""
        if self._has("tokenizer.json"):
            try:
                return Tokenizer.from_file(str(self.directory / "tokenizer.json"))
            except Exception as error:  # whatever the file's fault is, the library raises a bare Exception
                raise CheckpointError(f"{self.directory / 'tokenizer.json'} cannot be loaded: {error}") from error
        if self._has("tokenizer.model"):
            from surgeon.importers._sentencepiece import convert

            return self._with_bos_and_eos(convert(self.directory / "tokenizer.model", self.added))
        return self._from_vocabulary()

    def _with_bos_and_eos(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer, adding the tokens at both ends that the sentencepiece classes add."""
        added: dict[str, Any] = {}
        for key, default in (("bos_token", True), ("eos_token", False)):
            if self.settings.get(f"add_{key}", default):
                token = self.name(key)
                if token is not None and tokenizer.token_to_id(token) is None:
                    raise CheckpointError(f"{self.directory}: {key} is {token!r}, which the tokenizer does not have")
                added |= {key: token, f"add_{key}": True}
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **added).backend_tokenizer

    def _from_vocabulary(self) -> Tokenizer:
        name = str(self.settings.get("tokenizer_class", "")).removesuffix("Fast")
        if name != "Qwen2Tokenizer" or not self._has("merges.txt"):
            raise CheckpointError(
                f"{self.directory} has a vocab.json for {name or 'an unnamed tokenizer class'}, which is not known; "
                "save it once as a tokenizer.json, where you trust its code"
            )
        files = {"vocab": str(self.directory / "vocab.json"), "merges": str(self.directory / "merges.txt")}
        tokenizer: Tokenizer = transformers.Qwen2Tokenizer(**files).backend_tokenizer
        tokenizer.add_tokens([token for _, token in sorted(self.added.items())])
        return tokenizer

    def write(self, directory: Path, conversation: Conversation | None) -> None:
        """Write tokenizer.json, tokenizer_config.json and, where the conversation is known, chat_template.jinja.

        What was written is loaded again, and its added tokens compared. Raises CheckpointError where one differs.
        """
        tokenizer = self.convert()
        content = json.loads(tokenizer.to_str())
        for entry in content["added_tokens"]:
            if entry["content"] in IMAGE_TOKENS:
                entry |= {"special": True, "normalized": False}
        # The processor's class insists on a video placeholder. A token that a prompt cannot hold before its images
        # are expanded stands in where there is none, because a new one would have no row in the embedding.
        video = VIDEO if self.token_id(VIDEO) is not None else END_IMAGE
        config = {
            **{key: name for key in _NAMED if (name := self.name(key)) is not None},
            **{key: self.settings[key] for key in _KEPT if self.settings.get(key) is not None},
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "InternVLProcessor",
            "extra_special_tokens": {
                "start_image_token": START_IMAGE,
                "end_image_token": END_IMAGE,
                "context_image_token": IMAGE_TOKEN,
                "video_token": video,
            },
        }
        texts = {
            "tokenizer.json": json.dumps(content, ensure_ascii=False),
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        }
        if conversation is not None:
            # The template says the bos token where encoding would add it: whoever applies it may add none.
            bos = self.name("bos_token")
            adds_bos = bos is not None and tokenizer.encode("a").ids[:1] == [tokenizer.token_to_id(bos)]
            texts["chat_template.jinja"] = conversation.jinja(bos if adds_bos else None)
        for name, text in texts.items():
            (directory / name).write_text(text, encoding="utf-8")
        self._check(directory)

    def _check(self, directory: Path) -> None:
        loaded = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        for i, token in sorted(self.added.items()):
            token_id = loaded.convert_tokens_to_ids(token.content)
            if token_id != i or loaded.encode(token.content, add_special_tokens=False) != [i]:
                raise CheckpointError(
                    f"{self.directory}: the tokenizer cannot be converted: token {token.content!r} has id {i}, and "
                    f"would have {token_id}"
                )


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file."""
    return read_object(path, CheckpointError) if path.is_file() else {}
