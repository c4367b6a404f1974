"""What the tests know of a graft: how it is inserted into a tiny model.

Each kind has a file in `tests/graft_cases`, named by it, with `CASE`; a pass that inserts one without such a file fails
`tests/conformance`.
"""

from dataclasses import dataclass

from case_files import cases_in


@dataclass(frozen=True)
class GraftCase:
    recipe: str
    """What `--pass` takes, for models of three layers or more, hidden size 64, heads of 16."""


def graft_cases() -> dict[str, GraftCase]:
    """By kind."""
    return cases_in("graft_cases")
