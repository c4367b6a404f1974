"""The model card that a source has: which of its metadata a derived checkpoint inherits, and where it is kept.

A derived checkpoint has a card of its own. The source's is kept beside it as README-source.md, and the cards that the
source kept itself are renumbered: README-source-2.md is the card of the source's source.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgeon.checkpoint.hub import hub_origin, is_id
from surgeon.checkpoint.reader import Checkpoint
from surgeon.checkpoint.share import share_file

README = "README.md"
KEPT = "README-source.md"
_CARD = re.compile(r"README(?:-source(?:-(\d+))?)?\.md")
_INHERITED = ("language", "license", "license_name", "license_link")
"""What is as true of the copy as of the source. Evaluation results, widgets and the like are not."""


@dataclass(frozen=True)
class SourceCard:
    """inherited: metadata of the source's card, each value a string or a list of strings. base_models: hub ids that the
    source itself, where it is on the hub, or its card names. exists: whether it has a card."""

    exists: bool = False
    inherited: dict[str, Any] = field(default_factory=dict)
    base_models: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, source: Checkpoint, directory: Path) -> "SourceCard":
        """The card of `source`, for the derived checkpoint in `directory`, whose files are there already. A card that
        cannot be read counts as empty."""
        path = source.directory / README
        metadata = _metadata(path) if path.is_file() else {}
        inherited: dict[str, Any] = {key: value for key in _INHERITED if (value := _texts(metadata.get(key)))}
        if "license_link" in inherited:
            inherited["license_link"] = _link(inherited["license_link"], source, directory)
        origin = hub_origin(source.directory)
        base_models = metadata.get("base_model")
        base_models = (
            [base_models] if isinstance(base_models, str) else base_models if isinstance(base_models, list) else []
        )
        bases = [origin.repo] if origin else [each for each in base_models if isinstance(each, str) and is_id(each)]
        return cls(path.is_file(), {key: value for key, value in inherited.items() if value}, bases)


def card_files(source: Checkpoint) -> dict[Path, str]:
    """The source's card and those that it keeps -> the names that they have beside another card. Raises CheckpointError
    as `Checkpoint.side_files`."""
    matches = {path: match for path in source.side_files if (match := _CARD.fullmatch(path.name))}
    return {path: _kept_name(match) for path, match in matches.items()}


def keep_cards(source: Checkpoint, directory: Path) -> int:
    """Copy the source's card, and those that it keeps, under their new names. Returns the bytes written."""
    return sum(share_file(path, directory / name, "copy").bytes_written for path, name in card_files(source).items())


def _kept_name(match: re.Match[str]) -> str:
    if match[0] == README:
        return KEPT
    return f"README-source-{int(match[1] or 1) + 1}.md"


def _metadata(path: Path) -> dict[str, Any]:
    """The metadata block; empty where there is none that can be read."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        metadata = metadata_load(path)
    except (yaml.YAMLError, ValueError, OSError, RecursionError):
        return {}
    return metadata or {}


def _texts(value: Any) -> str | list[str] | None:
    """A string or a list of strings, as it is; None for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return value
    return None


def _link(link: Any, source: Checkpoint, directory: Path) -> str | None:
    """A licence's link, from beside the new card: one to a file that is not there leads to the hub, or nowhere."""
    if not isinstance(link, str):
        return None
    if "://" in link or (directory / link).is_file():
        return link
    origin = hub_origin(source.directory)
    return f"https://huggingface.co/{origin.repo}/blob/{origin.revision}/{link}" if origin else None
