"""Checks that source files do not change while they are read."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from surgeon.checkpoint.reader import CONFIG, INDEX, Checkpoint
from surgeon.errors import CheckpointError

_State = tuple[int, int, int, int]


@dataclass(frozen=True)
class SourceFiles:
    """Files as they were when they were first looked at: which they are, their size, when they were last written."""

    states: Mapping[Path, _State]

    @classmethod
    def of(cls, files: Iterable[Path]) -> Self:
        """Raises CheckpointError where one is missing."""
        return cls({file: _state(file) for file in files})

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint) -> Self:
        """Config, index, weight files and side files."""
        config_files = [checkpoint.directory / name for name in (CONFIG, INDEX)]
        return cls.of([*filter(os.path.lexists, config_files), *checkpoint.files, *checkpoint.side_files])

    @property
    def sizes(self) -> dict[Path, int]:
        """In bytes."""
        return {file: size for file, (_, _, size, _) in self.states.items()}

    def check(self) -> None:
        """Raises CheckpointError for the first file that is another one than before, or was written to."""
        for file, before in self.states.items():
            after = _state(file)
            if after != before:
                size_change = (
                    f"from {before[2]:,} to {after[2]:,} bytes" if after[2] != before[2] else "though not in size"
                )
                raise CheckpointError(
                    f"{file} changed while it was read, {size_change}; start again when nothing writes to it any more"
                )


def _state(file: Path) -> _State:
    try:
        about = os.stat(file)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot read it: {error.strerror or error}") from error
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns
