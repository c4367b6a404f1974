"""What a path holds, by the file that describes it."""

from pathlib import Path
from typing import Literal, get_args

ArtifactKind = Literal["checkpoint", "bundle", "engines"]
ARTIFACT_KINDS: tuple[ArtifactKind, ...] = get_args(ArtifactKind)
"""In the order in which each is made from the one before."""


def artifact_kind(path: str | Path) -> ArtifactKind:
    """A checkpoint where it is nothing else: a directory, or a name on the hub."""
    if (Path(path) / "engine.json").is_file():
        return "engines"
    return "bundle" if (Path(path) / "bundle.json").is_file() else "checkpoint"
