"""Cases that each have a file of their own, found by its name."""

import importlib
from functools import cache
from pathlib import Path
from typing import Any


@cache
def cases_in(package: str) -> dict[str, Any]:
    """The `CASE` of every file of a folder beside this, by the file's name, in alphabetical order; files with a leading
    underscore are what others share."""
    names = sorted(path.stem for path in (Path(__file__).parent / package).glob("[!_]*.py"))
    return {name: importlib.import_module(f"{package}.{name}").CASE for name in names}
