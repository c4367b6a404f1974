"""Cleaning up that never hides why it was needed."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def cleaning_up(action: Callable[[], object], description: str) -> Iterator[None]:
    """Run `action` when the `with` ends, however it ends.

    An exception of the body is raised again, with an error of `action` added as a note ("could not <description>:
    ..."), which the command line prints behind it. If the body raised nothing, an error of `action` is raised.
    """
    try:
        yield
    except BaseException as error:
        add_cleanup_errors(error, action, description)
        raise
    action()


def add_cleanup_errors(error: BaseException, action: Callable[[], object], description: str) -> None:
    """Run `action` because of `error`; what it raises itself becomes a note on `error`."""
    try:
        action()
    except Exception as second:  # whatever it is, the first one is why we are here
        error.add_note(f"could not {description}: {type(second).__name__}: {second}")


@contextmanager
def temporary_directory(prefix: str, directory: Path | None = None) -> Iterator[Path]:
    """An empty directory in `directory` (by default the system's for temporary files) that is removed at the end."""
    folder = tempfile.TemporaryDirectory(prefix=prefix, dir=directory)
    with cleaning_up(folder.cleanup, f"remove {folder.name}"):
        yield Path(folder.name)
