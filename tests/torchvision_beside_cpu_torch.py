"""torchvision where torch has no CUDA: package indexes have it built for torch with CUDA. Beside another build its
library of operators does not load, and then nothing of it can be imported. transformers needs none of the operators,
only that they are defined."""

import importlib
import importlib.util
import re
import sys
from pathlib import Path

import torch

_FOLDER = "torchvision"
"""Within the environment: where `make` puts it, outside of what every process imports."""
_UNUSED = "(Tensor x) -> Tensor"
_libraries: list[torch.library.Library] = []
"""Kept: a library's definitions go with it."""


def make_importable() -> bool:
    """Let `import torchvision` work in this process, if torchvision is there at all; -> whether it does. Operators are
    defined only where the import fails without them."""
    if importlib.util.find_spec("torchvision") is None:
        sys.path.append(str(Path(sys.prefix, _FOLDER)))
        if importlib.util.find_spec("torchvision") is None:
            sys.path.pop()
            return False
    for _ in range(100):
        try:
            importlib.import_module("torchvision")
            _tell_transformers()
            return True
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[name]
            _define(missing[1])
    raise RuntimeError("torchvision asks for more and more operators")


def _tell_transformers() -> None:
    """It asks once, when it is imported, and whoever runs the tests may have imported it before them."""
    if "transformers" in sys.modules:
        from transformers.utils import import_utils

        for name in ("is_torchvision_available", "is_torchvision_greater_or_equal", "is_torchvision_v2_available"):
            getattr(import_utils, name).cache_clear()


def _define(operator: str) -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define(f"{operator}{_UNUSED}")
    _libraries.append(library)
