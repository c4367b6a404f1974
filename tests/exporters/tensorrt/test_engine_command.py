"""`surgeon engine`, and `surgeon inspect` of what it wrote."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from command import run


def failed(result: Result, code: int, *expected: str) -> None:
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and all(part in line for part in expected), line


def test_build_and_inspect(engines: Any, tmp_path: Path) -> None:
    bundle, _, _ = engines()
    done = run("engine", bundle, tmp_path / "out", "--target", "sm89", "--graph", "embed", "--dtype", "fp16", "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["targets"] == ["sm89"] and report["peak_memory"]["embed"] > 0
    assert report["layers"]["embed"]["kernels"] > 0
    printed = run("inspect", tmp_path / "out")
    assert "tensorrt-rtx" in printed.stdout and "sm89" in printed.stdout and "embed.engine" in printed.stdout
    inspected = json.loads(run("inspect", tmp_path / "out", "--json").stdout)
    assert inspected == json.loads((tmp_path / "out" / "engine.json").read_text())
    again = run("engine", bundle, tmp_path / "out", "--target", "sm89", "--graph", "embed")
    failed(again, 2, "exists", "--overwrite")
    over = run("engine", bundle, tmp_path / "out", "--target", "sm80", "--graph", "memory", "--overwrite")
    assert over.exit_code == 0 and "memory.engine" in over.stdout
    assert not (tmp_path / "out" / "embed.engine").exists()


def test_dry_run_reads_no_weight_and_needs_no_library(engines: Any, tmp_path: Path, monkeypatch: Any) -> None:
    bundle, _, _ = engines()
    shutil.copytree(bundle, tmp_path / "bundle")
    for path in (tmp_path / "bundle" / "weights").iterdir():
        header = path.read_bytes()[: 8 + int.from_bytes(path.read_bytes()[:8], "little")]
        size = path.stat().st_size
        path.unlink()
        with open(path, "wb") as file:  # the header, then a hole
            file.write(header)
            file.truncate(size)
    import importlib.util

    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, real=importlib.util.find_spec: None if "tensorrt" in name else real(name),
    )
    arguments = (
        "engine",
        tmp_path / "bundle",
        "--target",
        "sm89",
        "--dry-run",
        "--batch",
        "1..4",
        "--prefill",
        "1..128",
    )
    done = run(*arguments, "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    plan = json.loads(done.stdout)
    assert plan["version"] is None and plan["weight_bytes"] > 0 and plan["cache_bytes"] > 0
    assert [each["name"] for each in plan["engines"]["decoder"]["profiles"]] == ["decode", "prefill"]
    printed = run(*arguments).stdout
    assert "decoder.engine" in printed and "S 1..128" in printed and "(not installed)" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"bundle"}
    failed(run(*arguments[:2], tmp_path / "out", "--target", "sm89"), 2, "pip install", "tensorrt-rtx")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--target", "sm12"), ("unknown target", "sm12")),
        (("--target", "sm89", "--batch", "9..1"), ("--batch 9..1",)),
        (("--target", "sm89", "--prefill", "1..4096"), ("--prefill", "256 tokens")),
        (("--target", "sm89", "--dtype", "bf16"), ("float16", "--dtype bf16")),
    ],
)
def test_refusals(engines: Any, tmp_path: Path, arguments: tuple[str, ...], expected: tuple[str, ...]) -> None:
    failed(run("engine", engines()[0], tmp_path / "out", *arguments), 2, *expected)


def test_out_may_be_left_out_for_a_plan_alone(engines: Any) -> None:
    done = run("engine", engines()[0], "--target", "sm89")
    assert done.exit_code == 2 and "OUT" in done.stderr
