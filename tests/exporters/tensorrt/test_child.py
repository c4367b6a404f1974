"""The process in which TensorRT works, as far as it can be looked at without TensorRT."""

import mmap
import os
import subprocess
from pathlib import Path

import pytest

from exporters.tensorrt.child import MappedWeights

SIZE = 8 << 20


def mapped(path: Path) -> mmap.mmap:
    """A file of random bytes that is mapped, every page of it read."""
    path.parent.mkdir(exist_ok=True)
    with open(path, "wb") as file:
        file.write(os.urandom(SIZE))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with open(path, "rb") as file:
        # as the library maps: for itself, and only to read
        mapping = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    assert len(mapping[:]) == SIZE
    return mapping


def resident(path: Path) -> int:
    """Bytes of a mapped file that are in this process's memory."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    assert any(line.endswith(str(path)) for line in lines), "it is mapped"
    return next(int(line.split()[1]) for line in lines if line.startswith("Rss:")) * 1024


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not tell what is resident")
def test_pages_of_mapped_weights_are_given_back_and_read_again(tmp_path: Path) -> None:
    kind = subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True, check=True).stdout
    if kind.strip() in ("tmpfs", "ramfs"):
        pytest.skip("there is no disk behind the files that tests write here")
    weights, other = tmp_path / "bundle with spaces" / "w.safetensors", tmp_path / "elsewhere" / "w.safetensors"
    first, second = mapped(weights), mapped(other)
    assert resident(weights) == resident(other) == SIZE
    MappedWeights(weights.parent, every=0).release()
    assert resident(weights) < SIZE // 4
    assert resident(other) == SIZE, "the files of others are left alone"
    assert first[:] == weights.read_bytes() and second[:] == other.read_bytes()


def test_it_is_not_done_all_the_time(tmp_path: Path) -> None:
    weights = tmp_path / "w" / "w.safetensors"
    mapping = mapped(weights)
    MappedWeights(weights.parent, every=3600).release()
    assert resident(weights) == SIZE
    mapping.close()
