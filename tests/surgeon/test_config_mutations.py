"""Whatever is wrong with a config.json, it is reported in one line: never an internal error, never a hang."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from config_mutations import SOURCES, Mutation, is_internal, make_sources, mutations, outcome
from surgeon import models
from surgeon.checkpoint import Checkpoint
from surgeon.errors import CheckpointError
from surgeon.models import build_meta, read_config
from surgeon.record import GRAFTS


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_sources(tmp_path_factory.mktemp("sources"))


def config_of(sources: dict[str, Path], name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((sources[name] / "config.json").read_text())
    return content


def test_what_is_sound_is_taken(sources: dict[str, Path], tmp_path: Path) -> None:
    for number, name in enumerate(SOURCES):
        for alone in (0, 1):
            error = outcome(Mutation(2 * number + alone, name, "nothing", config_of(sources, name)), sources, tmp_path)
            assert error is None, (name, error)


def test_mistakes_drawn_by_a_seed_are_told_in_one_line(sources: dict[str, Path], tmp_path: Path) -> None:
    refused = 0
    for mutation in mutations(sources, 150, seed=1):
        error = outcome(mutation, sources, tmp_path)
        assert not is_internal(error), (mutation.source, mutation.what, repr(error))
        assert "\n" not in str(error) and len(str(error)) < 700
        refused += error is not None
    assert refused > 75  # or nothing was mutated


def test_what_describes_an_entry_is_of_a_graft_that_is_there() -> None:
    files = Path(models.__file__).with_name("memory").glob("*.py")
    assert GRAFTS.keys() <= {path.stem for path in files if "\nGRAFT = " in path.read_text()}


def test_a_new_kind_of_graft_needs_no_description_here(
    sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own class checks its options then; what every graft has is checked all the same."""
    monkeypatch.delitem(GRAFTS, "pvm")
    config = config_of(sources, "qwen3_vl patched")
    build_meta(read_config(config))
    config["surgeon"]["grafts"][0].update(layers=[1, 4])
    with pytest.raises(CheckpointError, match="at layer 4"):
        read_config(config)


@pytest.mark.parametrize(
    ("source", "change", "expected"),
    [
        ("qwen3_vl", lambda c: c["text_config"].update(num_hidden_layers=10**9), "text_config.num_hidden_layers"),
        ("qwen3_vl", lambda c: c["vision_config"].update(depth=10**9), "vision_config.depth"),
        ("internvl", lambda c: c["text_config"].update(num_hidden_layers=3), "layer_types"),
        ("internvl", lambda c: c["text_config"]["rope_parameters"].update(rope_theta="1e6"), "rope_theta"),
        ("qwen2_5_vl", lambda c: c["text_config"]["rope_parameters"].update(mrope_section=[4, 2, 9]), "mrope_section"),
        ("qwen3_vl", lambda c: c["vision_config"].update(num_position_embeddings=65), "not a square"),
        ("qwen3_vl", lambda c: c["vision_config"].update(deepstack_visual_indexes=[0, 0]), "deepstack_visual_indexes"),
        ("qwen3_vl", lambda c: c["vision_config"].update(out_hidden_size=32), "out_hidden_size is 32"),
        ("qwen3_vl", lambda c: c["text_config"].update(num_attention_heads=3), "num_key_value_heads 2"),
        ("ovis2", lambda c: c["text_config"].update(hidden_act="silux"), "text_config.hidden_act: transformers has no"),
        ("llava_onevision", lambda c: c.update(image_grid_pinpoints=[[42]]), "image_grid_pinpoints: "),
        ("llava_onevision", lambda c: c.update(image_token_index=-1), "image_token_id"),
        ("qwen3_vl patched", lambda c: c.update(surgeon=[]), "'surgeon' is empty"),
        ("qwen3_vl patched", lambda c: c.pop("surgeon"), "'surgeon' is missing"),
        ("qwen3_vl patched", lambda c: c["surgeon"].update(grafts={}), "surgeon.grafts: "),
        ("qwen3_vl patched", lambda c: c["surgeon"]["grafts"][0].update(layers=[1, True]), "surgeon.grafts.0.layers.1"),
        ("qwen3_vl patched", lambda c: c["surgeon"]["grafts"][0].update(layers=[1, 4]), "at layer 4"),
        ("qwen3_vl patched", lambda c: c["surgeon"]["grafts"][0].update(layers=[1, 1]), "two grafts pvm at layer 1"),
        ("qwen3_vl patched", lambda c: c["surgeon"]["grafts"][0].update(kind=["pvm"]), "surgeon.grafts.0.kind"),
        ("qwen3_vl patched", lambda c: c["surgeon"]["grafts"][0].update(kind="other"), "which this version does not"),
        ("qwen3_vl patched", lambda c: c["surgeon"]["grafts"][0].pop("latent"), "surgeon.grafts.0.latent: missing"),
        ("qwen3_vl patched", lambda c: c["surgeon"]["grafts"][0].update(latent=40), "latent 40 is not divisible"),
        ("qwen3_vl patched", lambda c: c["surgeon"]["grafts"][0].update(laten=32), "surgeon.grafts.0.laten: not known"),
        ("qwen3_vl patched", lambda c: c["surgeon"]["grafts"][0].update(visibility="some"), "grafts.0.visibility"),
        ("qwen3_vl patched", lambda c: unlike_visibility(c["surgeon"]["grafts"]), "different visibilities"),
        ("qwen3_vl patched", lambda c: c["surgeon"]["grafts"][1].update(rope_axes=[0] * 7), "rope_axes"),
        ("qwen3_vl patched", lambda c: c["surgeon"].update(allocation="memory"), "whose layout is missing"),
        ("internvl patched", lambda c: c["surgeon"]["layout"].update(side=4), "layout has side 4"),
        ("internvl patched", lambda c: c["surgeon"]["positions"].update(tile_order="rows"), "positions.tile_order"),
        ("internvl patched", lambda c: c["surgeon"].update(passes={"pvm": {}}), "surgeon.passes: "),
    ],
)
def test_a_mistake_is_told_with_its_key(
    sources: dict[str, Path], source: str, change: Callable[[dict[str, Any]], Any], expected: str
) -> None:
    config = copy.deepcopy(config_of(sources, source))
    build_meta(read_config(config))
    change(config)
    with pytest.raises(CheckpointError) as caught:
        build_meta(read_config(config))
    assert expected in str(caught.value), caught.value


def unlike_visibility(grafts: list[dict[str, Any]]) -> None:
    grafts[0]["visibility"], grafts[1]["visibility"] = "all", "causal"


def test_a_fault_of_a_graft_is_not_taken_for_the_configs(
    sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where the model cannot be built without its grafts either is the config to blame."""
    from surgeon.memory.pvm import PersistentVisualMemory

    def broken(*args: object) -> None:
        raise ZeroDivisionError("of our own")

    with Checkpoint.open(sources["qwen3_vl patched"]) as checkpoint:
        config = read_config(checkpoint.config)
    monkeypatch.setattr(PersistentVisualMemory, "from_config", broken)
    with pytest.raises(ZeroDivisionError, match="of our own"):
        build_meta(config)
