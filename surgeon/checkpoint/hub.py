"""Where a checkpoint is: a directory, or an id on the Hugging Face Hub."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
from huggingface_hub import errors

from surgeon.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SMALL = ["*.json", "*.txt", "*.jinja", "*.model", "*.py", "README.md", "LICENSE*", "NOTICE*"]
_COMMIT = re.compile(r"[0-9a-f]{40}")
# The HTTP library of the hub's client, httpx or httpx2 by its version, raises kinds of this.
_HTTP_ERROR: type[Exception] = errors.HTTPError


class HubOrigin(NamedTuple):
    repo: str
    """The model's id."""
    revision: str
    """A commit."""


def is_id(text: str) -> bool:
    """Whether a hub id may look like this."""
    return _HUB_ID.fullmatch(text) is not None


def is_hub_id(path_or_id: str | Path) -> bool:
    """Whether this is a model on the hub: an id that is no path here. A `Path` is never one."""
    return isinstance(path_or_id, str) and is_id(path_or_id) and not Path(path_or_id).exists()


def hub_origin(directory: Path) -> HubOrigin | None:
    """What a snapshot in the Hugging Face cache is of, `.../models--<org>--<name>/snapshots/<commit>`; None for any
    other directory."""
    real = directory.resolve()
    kind, *parts = real.parent.parent.name.split("--")
    repo = "/".join(parts)
    if real.parent.name != "snapshots" or not _COMMIT.fullmatch(real.name) or kind != "models" or not is_id(repo):
        return None
    return HubOrigin(repo, real.name)


def resolve(path_or_id: str | Path, revision: str | None = None, weights: bool = True) -> Path:
    """The directory of a checkpoint, downloaded into the Hugging Face cache first where it is a hub id.

    A directory that exists wins over a hub id of the same name; a `Path` is never a hub id. `revision` is a hub
    branch, tag or commit. Without `weights`, weight files are left on the hub, and the cache may hold some or none.
    Raises CheckpointError where there is no such directory and no such model.
    """
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; name the checkpoint's directory, the one with config.json")
    if not is_hub_id(path_or_id):
        raise CheckpointError(f"no such directory: {path}")
    with explain(str(path_or_id), revision):
        # Weights of other formats and copies in subfolders are left where they are.
        return Path(
            huggingface_hub.snapshot_download(
                str(path_or_id),
                revision=revision,
                allow_patterns=["*.safetensors", *_SMALL] if weights else _SMALL,
                ignore_patterns=["*/*", ".*"],
            )
        )


@contextmanager
def explain(repo: str, revision: str | None = None) -> Iterator[None]:
    """Turns what the hub and its client raise into a CheckpointError."""
    at = f"{repo}@{revision}" if revision else repo
    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(f"{at} is gated: accept its terms on the hub, then run `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repo} has no revision {revision!r} on the Hugging Face Hub") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise CheckpointError(
            f"no directory {repo!r} here, and no such model on the Hugging Face Hub (a private one needs "
            "`hf auth login`)"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"no directory {repo!r} here, {at} is not complete in the Hugging Face cache, and the hub cannot be reached"
        ) from error
    except (OSError, _HTTP_ERROR) as error:  # HTTP errors of the hub and of its client, a full disk
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"cannot download {at}: {reason}") from error
