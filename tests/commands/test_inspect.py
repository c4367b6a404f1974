"""`surgeon inspect` prints sizes and parts, and JSON that is clean."""

import json
from pathlib import Path

import pytest

from command import run
from hub_stand_in import hub


def test_inspect_json_is_clean(source: Path) -> None:
    done = run("inspect", source, "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["family"] == "qwen3_vl"
    assert report["parameters"] == sum(part["parameters"] for part in report["parts"])


def test_inspect_prints_the_parts_and_where_grafts_go(source: Path) -> None:
    printed = run("inspect", source).stdout
    assert "layers 0 to 3" in printed and "multiples of 16" in printed and "vision tower" in printed
    assert f"{json.loads(run('inspect', source, '--json').stdout)['parameters']:,}" in printed


def test_a_hub_id_is_inspected_and_planned_for_without_its_weights(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def both(path: object) -> list[dict[str, object]]:
        inspected, planned = (
            run("inspect", path, "--json"),
            run("patch", path, "--pass", "pvm:layers=1", "--dry-run", "--json"),
        )
        return [json.loads(done.stdout) for done in (inspected, planned)]

    with hub("org/tiny", source, tmp_path / "cache", monkeypatch):
        inspected, planned = both("org/tiny")
    assert list(tmp_path.rglob("config.json")) and not list(tmp_path.rglob("*.safetensors"))
    assert [inspected | {"path": str(source)}, planned] == both(source)
