"""Files that are named after a kind of graft."""

import importlib
import importlib.util
from functools import cache
from types import ModuleType


@cache
def module_of(package: str, kind: str) -> ModuleType | None:
    """Of a package; None where it has none for this kind."""
    name = f"{package}.{kind}"
    return importlib.import_module(name) if importlib.util.find_spec(name) is not None else None
