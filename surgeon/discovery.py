"""Discovery of passes, families, importers, grafts and the exporters' counterparts of grafts: by file name, or by entry
point name in another installed package."""

import importlib
import importlib.util
import pkgutil
import warnings
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from surgeon.errors import SurgeonError


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
        """The one of this name, this project's own before another's; None where there is none. Raises SurgeonError for
        one of another package that cannot be loaded."""
        if name.isidentifier() and not name.startswith("_"):
            module = f"{self.package}.{name}"
            if importlib.util.find_spec(module) is not None:
                return getattr(importlib.import_module(module), self.attribute, None)
        entry = _installed_entry_points(self.group).get(name)
        return None if entry is None else _load(entry)

    def has_file(self, name: str) -> bool:
        """Whether a file of this name is here, whatever is in it."""
        return name in self.names() and name not in _installed_entry_points(self.group)

    def all(self) -> dict[str, Any]:
        """By name, in alphabetical order. Warns of what another package brings and cannot be loaded."""
        loaded = {}
        for name in self.names():
            try:
                loaded[name] = self.get(name)
            except SurgeonError as error:
                warnings.warn(f"left out: {error}", stacklevel=2)
        return {name: each for name, each in loaded.items() if each is not None}


def _load(entry: EntryPoint) -> Any:
    try:
        return entry.load()
    except Exception as error:  # whatever another package does when it is imported
        package = entry.dist.name if entry.dist is not None else "another package"
        reason = " ".join(str(error).split())
        raise SurgeonError(
            f"{entry.name!r}, which {package} brings under {entry.group}, cannot be loaded: {type(error).__name__}: "
            f"{reason}; mend or uninstall {package}"
        ) from error


@cache
def _installed_entry_points(group: str) -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=group)}
