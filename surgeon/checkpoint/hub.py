"""Where a checkpoint is: a directory, or an id on the Hugging Face Hub."""

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors

from surgeon.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model", "*.py"]


def resolve(path_or_id: str | Path, revision: str | None = None) -> Path:
    """The directory of a checkpoint, downloaded into the Hugging Face cache first where it is a hub id.

    A directory that exists wins over a hub id of the same name; a `Path` is never a hub id. `revision` is a hub
    branch, tag or commit. Raises CheckpointError where there is no such directory and no such model.
    """
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; name the checkpoint's directory, the one with config.json")
    if isinstance(path_or_id, Path) or not _HUB_ID.fullmatch(path_or_id):
        raise CheckpointError(f"no such directory: {path}")
    return _download(path_or_id, revision)


def _download(repo: str, revision: str | None) -> Path:
    at = f"{repo}@{revision}" if revision else repo
    try:
        # Weights of other formats and copies in subfolders are left where they are.
        return Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=_WANTED, ignore_patterns=["*/*", ".*"]
            )
        )
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
    except OSError as error:  # HTTP errors of the hub and of its client, a full disk
        raise CheckpointError(f"cannot download {at}: {str(error).splitlines()[0]}") from error
