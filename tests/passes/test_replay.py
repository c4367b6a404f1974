"""What a patched checkpoint records of its passes gives the same checkpoint again, byte for byte."""

import json
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

import passes
from checkpoints import FAMILIES, tiny_checkpoint, tiny_config
from command import run
from patching import apply
from surgeon.checkpoint.reader import Checkpoint
from surgeon.errors import OptionError
from surgeon.graph import LvlmGraph
from surgeon.memory.patched import RECORD
from surgeon.patch import plan
from surgeon.pipeline import (
    Pass,
    PassOptions,
    PassResult,
    PostconditionError,
    PreconditionError,
    make_pass,
    run_passes,
)
from surgeon.recipe import FILE_NAME, Recipe

TILED = ("internvl", "ovis2")
RECIPES: dict[str, tuple[str, ...]] = {
    "pvm": ("pvm:layers=every:2,latent=64,visibility=all",),
    "mixin": ("mixin",),
    "mixin short": ("mixin:every=2",),
    "mixin of its own": (
        "mixin:layers=strided:2,num_heads=3,intermediate=48,rope_theta=12345.678,eps=3e-7",
        "pvm:layers=3,0,latent=32",
    ),
}
TILED_RECIPES: dict[str, tuple[str, ...]] = {
    "rope-dhr": ("rope-dhr:tile_order=column,max_tiles=4",),
    "all": ("pvm:layers=1,latent=16", "rope-dhr:max_tiles=5", "mixin:every=4,head_dim=8,eps=1e-12,tiles=memory"),
}
CASES = [
    *((family, name, recipe) for family in FAMILIES for name, recipe in RECIPES.items()),
    *((family, name, recipe) for family in TILED for name, recipe in TILED_RECIPES.items()),
]


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cache(lambda family: tiny_checkpoint(tmp_path_factory.mktemp(family) / "source", family))


@pytest.mark.parametrize(("family", "name", "recipe"), CASES, ids=[f"{family} {name}" for family, name, _ in CASES])
def test_the_recipe_and_the_record_give_the_same_files(
    sources: Any, tmp_path: Path, family: str, name: str, recipe: tuple[str, ...]
) -> None:
    source, out = sources(family), tmp_path / "out"
    apply(source, out, *recipe, seed=3)
    expected = content(out)
    assert run("patch", source, tmp_path / "again", "-r", out / FILE_NAME).exit_code == 0
    assert content(tmp_path / "again") == expected
    record = json.loads(expected["config.json"])[RECORD]["passes"]
    assert yaml.safe_load(expected[FILE_NAME])["passes"] == record


def test_the_recipe_of_a_second_patch_is_that_of_the_second(sources: Any, tmp_path: Path) -> None:
    """Whatever of it changed nothing, and whatever the source had already, is not in it."""
    apply(sources("internvl"), tmp_path / "once", "pvm:layers=1,latent=32", seed=5)

    registry = {**passes.registry(), "nothing": Nothing}
    again = Recipe.from_arguments(["nothing", "mixin:every=2", "nothing"], 6).make_passes(registry)
    from surgeon.patch import patch

    patch(tmp_path / "once", tmp_path / "twice", again, seed=6)
    written = yaml.safe_load((tmp_path / "twice" / FILE_NAME).read_text())
    assert [list(entry) for entry in written["passes"]] == [["mixin"]]
    assert run("patch", tmp_path / "once", tmp_path / "again", "-r", tmp_path / "twice" / FILE_NAME).exit_code == 0
    assert content(tmp_path / "again") == content(tmp_path / "twice")


positive_floats = st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False)
layers = st.one_of(
    st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True),
    st.integers(0, 3),
    st.integers(1, 4).map(lambda n: f"every:{n}"),
    st.integers(1, 4).map(lambda n: f"strided:{n}"),
)
visibilities = st.sampled_from(["causal", "all"])
pvm_options = st.fixed_dictionaries(
    {"layers": layers},
    optional={"latent": st.sampled_from([16, 32, 64, "96", 24]), "visibility": visibilities},
)
mixin_options = st.fixed_dictionaries(
    {},
    optional={
        "layers": layers,
        "every": st.integers(1, 5),
        "num_heads": st.integers(1, 5),
        "head_dim": st.sampled_from([2, 7, 8, 16, 32]),
        "intermediate": st.integers(1, 64),
        "rope_theta": st.one_of(positive_floats, st.integers(1, 10**9), st.just("1e4")),
        "eps": st.floats(min_value=0, allow_nan=False, allow_infinity=False),
        "tiles": st.sampled_from(["both", "context", "memory"]),
        "visibility": visibilities,
    },
)
dhr_options = st.fixed_dictionaries(
    {},
    optional={
        "tile_order": st.sampled_from(["row", "column"]),
        "min_tiles": st.integers(1, 12),
        "max_tiles": st.integers(1, 12),
    },
)
entries = st.one_of(
    st.tuples(st.just("pvm"), pvm_options),
    st.tuples(st.just("mixin"), mixin_options),
    st.tuples(st.just("rope-dhr"), dhr_options),
)


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Configs alone: a plan needs no more."""
    directories = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, directory in directories.items():
        (directory / "config.json").write_text(json.dumps(tiny_config(family).to_dict()))
    return directories


@settings(max_examples=40)
@given(
    family=st.sampled_from(FAMILIES),
    chosen=st.lists(entries, min_size=1, max_size=3, unique_by=lambda entry: entry[0]),
    seed=st.integers(0, 2**63),
)
def test_any_plan_is_refused_or_replays(
    configs: dict[str, Path], family: str, chosen: list[tuple[str, dict[str, Any]]], seed: int
) -> None:
    """Refused for its options, and never because of a record that does not replay."""
    registry = passes.registry()
    with Checkpoint.open(configs[family], weights="optional") as source:
        try:
            first = [make_pass(registry, name, options) for name, options in chosen]
            graph, report = plan(source, first, seed)
        except (OptionError, PreconditionError):
            return
        path = configs[family] / FILE_NAME
        path.write_text(Recipe(seed=seed, passes=graph.record["passes"]).dump())
        recipe = Recipe.read(path)
        again, repeated = plan(source, recipe.make_passes(registry), recipe.seed)
    assert again.record == graph.record and repeated == report
    assert again.weights == graph.weights and again.image_processor == graph.image_processor


@pytest.mark.parametrize(("key", "value"), [("rms_norm_eps", 1e-12), ("rms_norm_eps", 1e-30)])
def test_what_the_backbone_has_can_be_given_back(tmp_path: Path, key: str, value: float) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("internvl", **{key: value}).to_dict()))
    with Checkpoint.open(tmp_path, weights="optional") as source:
        graph, _ = plan(source, Recipe.from_arguments(["mixin"]).make_passes(passes.registry()))
    assert graph.record["passes"][0]["mixin"]["eps"] == value


@pytest.mark.parametrize("option", ["rope_theta=inf", "eps=nan", "eps=inf"])
def test_numbers_that_json_has_not_are_refused(sources: Any, tmp_path: Path, option: str) -> None:
    done = run("patch", sources("internvl"), tmp_path / "out", "--pass", f"mixin:{option}")
    assert done.exit_code == 2 and "finite number" in done.stderr


# -- passes that break the promise -----------------------------------------------------------------------------------
class Nothing(Pass):
    name, summary, Options, identity = "nothing", "changes nothing", PassOptions, True

    def rewrite(self, graph: LvlmGraph) -> PassResult:
        return PassResult(modified=False, touched=[])


class DepthOptions(PassOptions):
    depth: int | None = Field(default=None, gt=0, le=8)


class OfDepth(Nothing):
    """`depth` is the graph's where no option sets it; each test breaks it in another way."""

    Options = DepthOptions
    recorded: ClassVar[Any] = {"depth": 4}

    def requires(self, graph: LvlmGraph) -> None:
        if self.options.depth == 7:
            raise PreconditionError("depth=7 is unlucky")

    def resolved(self, graph: LvlmGraph) -> dict[str, Any]:
        return dict(self.recorded) if self.options.depth is None else self.options.model_dump()

    def rewrite(self, graph: LvlmGraph) -> PassResult:
        raise AssertionError("a pass that does not replay is refused before it does anything")


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        ({"depth": 9}, "'depth'.*less than or equal to 8"),
        ({"depth": 7}, "depth=7 is unlucky"),
        ({"depth": 4, "width": 2}, "unknown option 'width'"),
        ({"depth": "4"}, "option 'depth' is '4', and then 4"),
        ({"depth": None}, "option 'depth' is None, and then 4"),
        ({"depth": (4,)}, r"are read back as {'depth': \[4\]}"),
    ],
)
def test_a_pass_whose_record_does_not_replay_is_refused(
    configs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, recorded: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(OfDepth, "recorded", recorded)
    if recorded == {"depth": None}:
        monkeypatch.setattr(OfDepth, "resolved", changing(recorded, {"depth": 4}))
    with Checkpoint.open(configs["internvl"], weights="optional") as source:
        graph = LvlmGraph.read(source)
        with pytest.raises(PostconditionError, match=f"pass nothing would record options .*: .*{message}"):
            run_passes(graph, [OfDepth(DepthOptions())])
    assert graph.record["passes"] == []


def changing(*values: dict[str, Any]) -> Any:
    """A `resolved` that says something else each time."""
    pending = list(values)
    return lambda self, graph: pending.pop(0)
