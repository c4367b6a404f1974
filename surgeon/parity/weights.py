"""Which tensors of a checkpoint's backbone another checkpoint changed."""

from pathlib import Path

import torch

from surgeon.checkpoint.reader import Checkpoint


def changed_tensors(source: str | Path, patched: str | Path) -> tuple[list[str], list[str]]:
    """(tensors of `source` that `patched` holds with other values, those that it does not hold), by checkpoint key."""
    changed, missing = [], []
    with Checkpoint.open(source) as a, Checkpoint.open(patched) as b:
        for name in a.tensors:
            if name not in b.tensors:
                missing.append(name)
            elif not torch.equal(a.read(name), b.read(name)):
                changed.append(name)
            for checkpoint in (a, b):
                if name in checkpoint.tensors:
                    checkpoint.release(name)
    return changed, missing
