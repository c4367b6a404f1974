"""Options that several commands share: what they mean for several paths at once."""

import json
from pathlib import Path

import pytest

from checkpoints import has_tokenizer
from command import assert_refused, run
from commands._options import provider_of


def some(form: str, directory: Path) -> str:
    """A directory that holds a checkpoint, a bundle or engines, as far as its name tells."""
    directory.mkdir()
    name = {"bundle": "bundle.json", "engines": "engine.json", "checkpoint": "config.json"}[form]
    (directory / name).write_text("{}")
    return str(directory)


@pytest.mark.parametrize(
    ("forms", "meant"),
    [
        (["bundle"], True),
        (["checkpoint", "bundle"], True),
        (["bundle", "checkpoint"], True),
        (["engines", "bundle", "checkpoint"], True),
        (["checkpoint"], False),
        (["checkpoint", "engines"], False),
    ],
)
def test_a_backend_is_for_the_bundles_among_the_paths(forms: list[str], meant: bool, tmp_path: Path) -> None:
    paths = [some(form, tmp_path / str(i)) for i, form in enumerate(forms)]
    assert provider_of(None, *paths) == "auto"
    if meant:
        assert provider_of("ort-cpu", *paths) == "cpu"
        assert provider_of("ort-tensorrt-rtx", *paths) == "tensorrt-rtx"
        return
    for command in ("bench", "validate"):
        if command == "validate" and len(paths) != 2:
            continue
        result = run(command, *paths, "--backend", "ort-cpu")
        assert result.exit_code == 2 and result.stdout == ""
        assert "--backend ort-cpu is for bundles, and there is none among " + ", ".join(paths) in result.stderr


@pytest.mark.skipif(not has_tokenizer(), reason="needs the demo checkpoint's tokenizer")
def test_a_checkpoint_beside_a_bundle_takes_a_backend(source: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    assert run("export", source, bundle, "--dtype", "fp32", "--max-length", 64).exit_code == 0
    asked = ("--prompt", "hello", "--steps", 2, "--backend", "ort-cpu", "--json")
    for pair in ((source, bundle), (bundle, bundle)):
        result = run("validate", *pair, *asked)
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["passed"]
    (bundle / "decoder.onnx").unlink()
    assert_refused(run("validate", source, bundle, *asked), "decoder.onnx")


@pytest.mark.parametrize("equals", [True, False])
def test_the_former_name_of_an_option_is_taken_with_a_warning(tmp_path: Path, equals: bool) -> None:
    for former, name in (("--picture-tokens", "--image-tokens"), ("--blocks", "--tile-configs")):
        asked = [f"{former}=nonsense"] if equals else [former, "nonsense"]
        now = [f"{name}=nonsense"] if equals else [name, "nonsense"]
        old, new = (run("engine", tmp_path, tmp_path / "out", *each) for each in (asked, now))
        warning, error = old.stderr.splitlines()
        assert warning == f"warning: {former} is called {name} now; the former name goes with the next release"
        assert [error] == new.stderr.splitlines() and old.exit_code == new.exit_code == 2
    assert "--blocks" not in run("engine", "--help").stdout
