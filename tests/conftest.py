"""Settings for all tests."""

import gc
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

from torchvision_beside_cpu_torch import make_importable

if TYPE_CHECKING:
    from pairs import Pair
    from vismem_models import VisMemPair

# Models here are tiny, and workers share the cores: threads of their own would wait for each other, three times as
# long. Workers and commands inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# Kernels run in Triton's interpreter here, which must be known before the first of them is defined.
os.environ["TRITON_INTERPRET"] = "1"

# A tenth of the time goes into looking for garbage among the millions of objects that libraries keep.
gc.set_threshold(100_000, 20, 100)

# Before the first test imports transformers, which asks once whether it is there.
make_importable()

# A busy machine is no failure: property tests are bounded by their examples, not by time.
settings.register_profile("surgeon", deadline=None)
settings.load_profile("surgeon")

_KERNELS = "SURGEON_KERNELS_DIR"


def pytest_configure(config: pytest.Config) -> None:
    """What is compiled is kept for this run alone, and by all its processes: the first makes the folder."""
    if not hasattr(config, "workerinput"):
        os.environ[_KERNELS] = tempfile.mkdtemp(prefix="surgeon-tests-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop(_KERNELS), ignore_errors=True)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """shared(name, make): a folder that `make(folder)` has filled, once in the whole run: the first worker that asks
    makes it, the others wait. No test writes into it."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    root.mkdir(exist_ok=True)

    def get(name: str, make: Callable[[Path], object]) -> Path:
        stem = hashlib.sha256(name.encode()).hexdigest()[:16]
        folder, marker = root / stem, root / f"{stem}.made"
        with FileLock(root / f"{stem}.lock"):
            if not marker.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
                folder.mkdir()
                make(folder)
                marker.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded checkpoint for commands to work on. Tests that damage one copy it."""
    from checkpoints import tiny_checkpoint  # imports transformers, which may not be before the settings above

    return tiny_checkpoint(tmp_path_factory.mktemp("source") / "source", "qwen3_vl", sharded=True)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws does not depend on which ran before it in its worker."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def export(shared: Callable[..., Path], quick_exports: None) -> Callable[..., "Pair"]:
    """export(model_type, recipe, dtype, **options of tiny_checkpoint): a checkpoint beside its bundle, made once."""
    from pairs import PVM, Pair, make_pair

    pairs: dict[str, Pair] = {}  # what a pair has loaded is kept with it

    def get(model_type: str, recipe: Sequence[str] = PVM, dtype: torch.dtype = torch.float32, **options: Any) -> Pair:
        if not recipe:
            options.pop("visibility", None)  # there is nothing to see
        name = f"{model_type} {tuple(recipe)} {dtype} {sorted(options.items())}"
        if name not in pairs:
            folder = shared(name, lambda path: make_pair(path, model_type, recipe, dtype, **options))
            pairs[name] = Pair.within(folder)
        return pairs[name]

    return get


@pytest.fixture(scope="session")
def quick_exports() -> Iterator[None]:
    """What is traced for an export is traced once in the whole run."""
    from traced_once import traced_once

    with traced_once(Path(os.environ[_KERNELS]) / "traces"):
        yield


@pytest.fixture(scope="session")
def vismem_pair(shared: Callable[..., Path]) -> Callable[..., "VisMemPair"]:
    """vismem_pair(model_type, short_former, **options of tiny_checkpoint): a plain checkpoint beside one that calls for
    memory, each made and loaded once. No test changes them."""
    from vismem_models import VisMemPair, recipe

    pairs: dict[str, VisMemPair] = {}

    def get(model_type: str, short_former: str = "vision", **options: Any) -> VisMemPair:
        name = f"vismem {model_type} {short_former} {sorted(options.items())}"
        if name not in pairs:
            passes = recipe(short_former)
            pairs[name] = VisMemPair(shared(name, lambda path: VisMemPair.create(path, model_type, *passes, **options)))
        return pairs[name]

    return get
