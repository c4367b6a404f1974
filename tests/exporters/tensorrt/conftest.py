"""Engines of tiny bundles, built once for all tests of them, and single graphs built without a bundle."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from engines import CASES, Case
from exporters.child_process import Outcome, run_child
from exporters.tensorrt import layers
from exporters.tensorrt.build import Built, Options, build_engines
from exporters.tensorrt.library import CHILD, link_libraries
from exporters.tensorrt.profiles import Limits, Range
from pairs import Pair

TARGETS = "sm80,sm89,sm120"


@pytest.fixture(scope="session")
def bundle_of(export: Callable[..., Pair]) -> Callable[[Case], Pair]:
    return lambda case: export(case.model_type, case.recipe, getattr(torch, case.dtype), visibility=case.visibility)


@pytest.fixture(scope="session")
def engines(bundle_of: Callable[[Case], Pair], built_once: Callable[..., Any]) -> Callable[..., Any]:
    """engines(case) -> bundle, directory of its engines, and what was built; made once for each."""

    def get(case: Case = CASES[0]) -> tuple[Path, Path, Built]:
        bundle, target = bundle_of(case).bundle, TARGETS if case is CASES[0] else "sm89"
        return bundle, *built_once(str(case), bundle, Options(target=target, limits=Limits(batch=Range.of(1, 4))))

    return get


@pytest.fixture(scope="session")
def built_once(shared: Callable[..., Path]) -> Callable[[str, Path, Options], tuple[Path, Built]]:
    """built_once(name, bundle, options) -> a directory of engines, and what was built; once in the whole run."""

    def make(folder: Path, bundle: Path, options: Options) -> None:
        (folder / "built").write_bytes(pickle.dumps(build_engines(bundle, folder / "out", options)))

    def get(name: str, bundle: Path, options: Options) -> tuple[Path, Built]:
        folder = shared(f"engines {name}", lambda path: make(path, bundle, options))
        return folder / "out", pickle.loads((folder / "built").read_bytes())

    return get


@pytest.fixture
def build_graph(tmp_path: Path) -> Callable[..., tuple[Outcome, str]]:
    """build_graph(model, shapes=..., targets=...) -> what the child reported, and the engine's layers as it
    logged them."""

    def build(model: onnx.ModelProto, targets: tuple[str, ...] = ("sm89",), **shapes: Any) -> tuple[Outcome, str]:
        path = tmp_path / "graph.onnx"
        path.write_bytes(model.SerializeToString())
        spec = {
            "module": "tensorrt_rtx",
            "graph": str(path),
            "beside": str(path),
            "output": str(tmp_path / "engine"),
            "layers": str(tmp_path / "layers"),
            "report": layers.REPORTED,
            "targets": targets,
            "profiles": [shapes],
            "timing_cache_in": None,
            "timing_cache_out": None,
        }
        (tmp_path / "spec.json").write_text(json.dumps(spec))
        links = tmp_path / "lib"
        if not links.exists():
            link_libraries("tensorrt-rtx", links)
        outcome = run_child(["build", str(tmp_path / "spec.json")], "the test", tmp_path / "log", CHILD, links)
        logged = tmp_path / "layers"
        return outcome, logged.read_text() if logged.exists() else ""

    return build
