"""What the tests know of a graft: how it is inserted into a tiny model.

Each kind has a file in `tests/graft_cases`, named by it, with `CASE`; a pass that inserts one without such a file fails
`tests/conformance`.
"""

import importlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class GraftCase:
    recipe: str
    """What `--pass` takes, for models of three layers or more, hidden size 64, heads of 16."""


@cache
def graft_cases() -> dict[str, GraftCase]:
    """By kind."""
    folder = Path(__file__).parent / "graft_cases"
    names = sorted(path.stem for path in folder.glob("[!_]*.py"))
    return {name: importlib.import_module(f"graft_cases.{name}").CASE for name in names}
