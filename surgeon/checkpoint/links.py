"""Symbolic links in a checkpoint: which of them may be followed when their content is copied elsewhere."""

import os
from pathlib import Path

from huggingface_hub import constants

from surgeon.errors import CheckpointError

_BLOBS = "blobs"


def check_link(path: Path, root: Path) -> None:
    """Refuse a symbolic link in the directory `root` that leads to nothing, or out of `root` and of the Hugging Face
    cache, whose snapshots are links to its blobs. What is no link passes. Raises CheckpointError.

    A checkpoint comes from others: a tokenizer.json that is a link to some file of this machine would carry that file's
    content into whatever is made of the checkpoint.
    """
    if not path.is_symlink():
        return
    leads_to = Path(os.path.realpath(path))
    if not leads_to.exists():
        raise CheckpointError(f"{path} is a link to {leads_to}, which is not there; download or copy it again")
    if not any(allowed in leads_to.parents for allowed in _allowed(Path(os.path.realpath(root)), leads_to)):
        raise CheckpointError(
            f"{path} is a link to {leads_to}, outside the directory, and is not followed; put the file itself there, "
            "or remove the link"
        )


def _allowed(root: Path, leads_to: Path) -> list[Path]:
    allowed = [root]
    if root.parent.name == "snapshots":  # <cache>/models--<owner>--<name>/snapshots/<commit>
        allowed.append(root.parents[1] / _BLOBS)
    cache = Path(os.path.realpath(constants.HF_HUB_CACHE))
    if cache in leads_to.parents:  # a directory of links to what was downloaded
        allowed.append(cache / leads_to.relative_to(cache).parts[0] / _BLOBS)
    return allowed
