"""What other packages bring by entry points, as `pip install` would leave them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import passes
from surgeon import discovery
from surgeon.discovery import Extensions
from surgeon.errors import SurgeonError

PASS = """
from surgeon.pipeline import Pass, PassOptions, PassResult

class Other(Pass):
    name, summary, identity, Options = {name!r}, "another package's", True, PassOptions

    def rewrite(self, graph):
        return PassResult(modified=False, touched=[])
"""
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """install(group, entry point, module, source): a package that brings one thing."""

    def add(group: str, entry: str, module: str, source: str) -> None:
        (tmp_path / f"{module}.py").write_text(source)
        folder = tmp_path / f"{module}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        attribute = "Other" if source.startswith("\nfrom surgeon.pipeline") else "THING"
        (folder / "entry_points.txt").write_text(f"[{group}]\n{entry} = {module}:{attribute}\n")
        discovery._installed_entry_points.cache_clear()

    monkeypatch.syspath_prepend(tmp_path)
    yield add
    discovery._installed_entry_points.cache_clear()


def test_a_pass_of_another_package_is_one_of_the_passes(install: Install) -> None:
    install("surgeon.passes", "other-pass", "a_package", PASS.format(name="other-pass"))
    assert passes.registry()["other-pass"].summary == "another package's"
    assert {"pvm", "mixin", "rope-dhr"} <= passes.registry().keys()


@pytest.mark.parametrize("name", ["pvm", "third"])
def test_one_that_calls_itself_otherwise_takes_no_others_place(install: Install, name: str) -> None:
    own = passes.registry()
    install("surgeon.passes", "other-pass", f"package_of_{name}", PASS.format(name=name))
    with pytest.warns(UserWarning, match=f"the entry point 'other-pass' calls itself '{name}'"):
        assert passes.registry() == own


def test_one_of_this_projects_name_is_not_taken(install: Install) -> None:
    own = passes.registry()
    install("surgeon.passes", "pvm", "c_package", PASS.format(name="pvm"))
    assert passes.registry() == own


def test_what_cannot_be_loaded_is_named_and_does_not_stop_the_rest(install: Install) -> None:
    things = Extensions("passes", "PASS", group="surgeon.passes")
    install("surgeon.passes", "broken", "d_package", "raise RuntimeError('boom')")
    with pytest.raises(
        SurgeonError, match=r"'broken', which d.package brings .* RuntimeError: boom; mend or uninstall"
    ):
        things.get("broken")
    with pytest.warns(UserWarning, match="left out: 'broken'"):
        assert "pvm" in passes.registry()
