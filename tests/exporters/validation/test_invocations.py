"""`surgeon validate` of forms that call for memory: what is formed is judged, and a fault in it fails."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from exporters.validation.validate import validate_pair
from pairs import VISMEM, Pair, image
from surgeon.checkpoint import read_header
from surgeon.inputs import Prompt
from surgeon.memory.memory_tokens import LONG, SHORT
from surgeon.parity.invocations import schedule_of

PNG = "picture.png"


@pytest.fixture(scope="module")
def pair(export: Callable[..., Pair]) -> Pair:
    return export("qwen3_vl", VISMEM)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / PNG
    image(64, 96).save(path)
    return path


def with_other_values(bundle: Path, target: Path, parameter: str) -> Path:
    """The bundle with a parameter's values doubled in sign, in a file of its own."""
    shutil.copytree(bundle, target)
    for path in (target / "weights").iterdir():
        info = read_header(path).get(parameter)
        if info is not None:
            content = bytearray(path.read_bytes())
            own = slice(info.offset, info.offset + info.nbytes)
            content[own] = content[own][4:] + content[own][:4]  # each value in its neighbour's place
            path.unlink()
            path.write_bytes(content)
            return target
    raise AssertionError(f"no weight file holds {parameter}")


def test_forced_and_free_invocations_are_judged(pair: Pair, picture: Path) -> None:
    report = validate_pair(pair.checkpoint, pair.bundle, [picture], "What is it?", steps=4)
    checks = {check.name: check for check in report.checks}
    assert report.passed and not checks["forced"].failures and not checks["free"].failures
    assert checks["forced"].said.startswith("2 invocations in 1 row(s)")


@pytest.mark.parametrize(
    "parameter",
    [
        "model.vismem.query_builder.query_init",
        "model.vismem.short.memory_init",
        "model.vismem.short.adapters.0.attn.qkv_low_rank.expand.weight",
        "model.vismem.long.memory_init",
        "model.vismem.long.adapters.2.self_attn.q_proj_low_rank.reduce.weight",
    ],
)
def test_other_values_in_what_forms_memory_fail(pair: Pair, picture: Path, tmp_path: Path, parameter: str) -> None:
    faulty = with_other_values(pair.bundle, tmp_path / "faulty", parameter)
    report = validate_pair(pair.checkpoint, faulty, [picture], "What is it?", steps=4)
    failed = [check.name for check in report.checks if check.failures]
    assert not report.passed and "forced" in failed
    assert all(not case.failures for comparison in report.comparisons for case in comparison.cases)


def test_the_source_is_compared_with_memory_kept_from_calling(pair: Pair, picture: Path) -> None:
    source = pair.checkpoint.parent / "source"
    report = validate_pair(source, pair.bundle, [picture], "What is it?", steps=4)
    assert report.passed and any("was kept from calling" in note for note in report.notes)


def test_a_schedule_calls_in_every_order() -> None:
    record = {"short_former": "vision"}
    picture_prompt, text = Prompt("a", (image(8, 8),)), Prompt("b")
    schedule = schedule_of([picture_prompt, picture_prompt, text, picture_prompt], record, 8)
    assert schedule == [{0: SHORT, 4: LONG}, {1: LONG, 5: SHORT}, {2: LONG, 6: LONG}, {}]
    assert schedule_of([text], {"short_former": "language"}, 8) == [{0: SHORT, 4: LONG}]
