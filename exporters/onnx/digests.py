"""SHA-256 of files as large as a model's weights: several at once, each read once."""

import hashlib
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from surgeon.progress import Progress

_CHUNK = 4 << 20
_THREADS = 4


def sha256_of_files(paths: Sequence[Path], progress: Progress | None = None) -> dict[Path, str]:
    """Path -> hex digest. `progress(stage, done, total)` counts bytes. A file that several of the paths lead to (hard
    links) is read once. Raises OSError for one that cannot be read."""
    by_inode = {(info.st_dev, info.st_ino): path for path, info in ((path, path.stat()) for path in paths)}
    total, done, lock = sum(path.stat().st_size for path in by_inode.values()), 0, threading.Lock()

    def digest(path: Path) -> str:
        nonlocal done
        hasher, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                hasher.update(buffer[:count])  # other threads run meanwhile
                with lock:
                    done += count
                    if progress:
                        progress("digests", done, total)
        return hasher.hexdigest()

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        digests = dict(zip(by_inode, pool.map(digest, by_inode.values()), strict=True))
    return {path: digests[(info.st_dev, info.st_ino)] for path, info in ((path, path.stat()) for path in paths)}
