"""What a short prompt does not show of how a model is set."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoints import tiny_checkpoint
from exporters.validation.validate import validate_pair
from patching import apply
from surgeon.inputs import Inputs
from surgeon.parity.settings import compare_settings


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("settings")
    source = tiny_checkpoint(directory / "source", "internvl")
    apply(source, directory / "patched", "pvm:layers=1,latent=32", "rope-dhr")
    return source, directory / "patched"


def of_json(change: Callable[[Any], None]) -> Callable[[str], str]:
    def changed(text: str) -> str:
        values = json.loads(text)
        change(values)
        return json.dumps(values)

    return changed


CHANGES: dict[str, tuple[str, Callable[[str], str], str]] = {
    "window": (
        "config.json",
        of_json(lambda d: d["text_config"].update(use_sliding_window=True, sliding_window=500)),
        "text_config.sliding_window",
    ),
    "vision": ("config.json", of_json(lambda d: d["vision_config"].update(layer_norm_eps=0.1)), "vision_config"),
    "tiles": ("preprocessor_config.json", of_json(lambda d: d.update(max_patches=3)), "max_patches is 6"),
    "tokenizer": ("tokenizer.json", of_json(lambda d: d["model"]["merges"].pop()), "tokenizers"),
    "template": ("chat_template.jinja", lambda t: t + "{% if messages|length > 4 %}?{% endif %}", "chat templates"),
    "sampling": ("generation_config.json", of_json(lambda d: d.update(suppress_tokens=[7])), "suppress_tokens is None"),
    "end": ("generation_config.json", of_json(lambda d: d.update(eos_token_id=7)), "answers end with the tokens"),
}


def test_a_patched_checkpoint_is_set_as_its_source_is(pair: tuple[Path, Path]) -> None:
    assert not compare_settings(*map(Inputs.from_directory, pair))


@pytest.mark.parametrize("what", CHANGES)
def test_another_setting_is_named(what: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    file, change, message = CHANGES[what]
    altered = shutil.copytree(pair[1], tmp_path / "altered")
    (altered / file).write_text(change((altered / file).read_text()))
    failures = compare_settings(Inputs.from_directory(pair[0]), Inputs.from_directory(altered))
    assert any(message in failure for failure in failures)


def test_the_verdict_rests_on_them(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Logits and tokens of the prompt are equal, and an answer would never end."""
    altered = shutil.copytree(pair[1], tmp_path / "altered")
    file = altered / "generation_config.json"
    file.write_text(CHANGES["end"][1](file.read_text()))
    report = validate_pair(pair[0], altered, prompt="Hello", steps=1)
    assert report.verdict == "failed"
    assert all(comparison.verdict != "failed" for comparison in report.comparisons)
    assert next(check for check in report.checks if check.name == "settings").failures
