"""Imports run one way: between the top-level packages, between those of `exporters`, and in no circle of files."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ["surgeon", "passes", "exporters", "commands", "cli"]
WITHIN_EXPORTERS = [
    "artifact", "child_process", "operators", "kernels", "onnx", "fusion", "runtime", "onnxruntime", "tensorrt",
    "generation", "calibration", "export", "validation", "bench", "serving",
]  # fmt: skip
"""Each may import what stands before it."""


def modules() -> dict[str, Path]:
    files = [ROOT / "cli.py", *(file for name in PACKAGES for file in (ROOT / name).rglob("*.py"))]
    dotted = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    return {name.removesuffix(".__init__"): file for name, file in dotted.items()}


def imports(file: Path, known: dict[str, Path]) -> set[str]:
    """The project's modules that a file imports, also within its functions; not for types alone."""
    tree = ast.parse(file.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (inner & known.keys()) or {node.module}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names & known.keys()


@pytest.fixture(scope="module")
def arrows() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(file, known) for name, file in known.items()}


def test_packages_import_those_below(arrows: dict[str, set[str]]) -> None:
    order = {name: place for place, name in enumerate(PACKAGES)}
    up = [(a, b) for a, below in arrows.items() for b in below if order[b.split(".")[0]] > order[a.split(".")[0]]]
    assert not up and len(arrows) > 200


def test_rooms_of_exporters_import_those_below(arrows: dict[str, set[str]]) -> None:
    packages = {path.stem for path in (ROOT / "exporters").glob("[!_]*") if path.suffix in ("", ".py")}
    assert packages == set(WITHIN_EXPORTERS)

    def place(module: str) -> int:
        return WITHIN_EXPORTERS.index(module.split(".")[1])

    inside = {name: below for name, below in arrows.items() if name.startswith("exporters.")}
    up = [(a, b) for a, below in inside.items() for b in below if b in inside and place(b) > place(a)]
    assert not up


def test_no_file_imports_itself_by_way_of_others(arrows: dict[str, set[str]]) -> None:
    left = dict(arrows)
    while ready := [name for name, below in left.items() if not below & left.keys()]:
        for name in ready:
            del left[name]
    assert not left, f"in a circle, or above one: {sorted(left)}"
