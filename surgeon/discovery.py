"""Discovery of passes, families, importers, grafts and the exporters' counterparts of grafts: by file name, or by entry
point name in another installed package."""

import importlib
import importlib.util
import pkgutil
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any


@dataclass(frozen=True)
class Extensions:
    """All that there is of one kind of thing."""

    package: str
    """Each of this project's own is a file of this package that bears its name; files with a leading underscore are
    none."""
    attribute: str
    """What it is called in its file."""
    group: str
    """The group of entry points by which another package brings one; the entry point bears its name."""

    def names(self) -> list[str]:
        """In alphabetical order. A package in which other files lie too has more names than things."""
        spec = importlib.util.find_spec(self.package)
        assert spec is not None
        files = (module.name for module in pkgutil.iter_modules(spec.submodule_search_locations))
        return sorted({name for name in files if not name.startswith("_")} | _installed_entry_points(self.group).keys())

    def get(self, name: str) -> Any | None:
        """The one of this name, this project's own before another's; None where there is none."""
        if name.isidentifier() and not name.startswith("_"):
            module = f"{self.package}.{name}"
            if importlib.util.find_spec(module) is not None:
                return getattr(importlib.import_module(module), self.attribute, None)
        entry = _installed_entry_points(self.group).get(name)
        return None if entry is None else entry.load()

    def has_file(self, name: str) -> bool:
        """Whether a file of this name is here, whatever is in it."""
        return name in self.names() and name not in _installed_entry_points(self.group)

    def all(self) -> dict[str, Any]:
        """By name, in alphabetical order."""
        return {name: each for name in self.names() if (each := self.get(name)) is not None}


@cache
def _installed_entry_points(group: str) -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=group)}
