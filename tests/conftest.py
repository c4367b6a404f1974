"""Settings for all tests."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from torchvision_beside_cpu_torch import make_importable

# Models here are tiny, and workers share the cores: threads of their own would wait for each other, three times as
# long. Workers and commands inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# Kernels run in Triton's interpreter here, which must be known before the first of them is defined.
os.environ["TRITON_INTERPRET"] = "1"

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
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded checkpoint for commands to work on. Tests that damage one copy it."""
    from checkpoints import tiny_checkpoint  # imports transformers, which may not be before the settings above

    return tiny_checkpoint(tmp_path_factory.mktemp("source") / "source", "qwen3_vl", sharded=True)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws does not depend on which ran before it in its worker."""
    torch.manual_seed(0)
