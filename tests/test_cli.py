"""The command line: what it prints where, its exit codes, and that bad input is one line and leaves nothing behind."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import load_file

import surgeon.patch
from checkpoints import DEMO, has_tokenizer, tiny_checkpoint
from cli import cli
from surgeon import __version__, models
from surgeon.doctor import Backend, Diagnosis, Package, Storage
from surgeon.torch_generate import answer

ROOT = Path(__file__).resolve().parents[1]
PVM = "pvm:layers=1,3,latent=32"
QWEN3_VL_8B = {
    "model_type": "qwen3_vl",
    "text_config": {
        "model_type": "qwen3_vl_text",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "vision_config": {"out_hidden_size": 4096, "deepstack_visual_indexes": [8, 16, 24]},
}
QWEN3_VL_4B = json.loads(json.dumps(QWEN3_VL_8B).replace("4096", "2560").replace("12288", "9728"))


def run(*arguments: object) -> Result:
    """The command, in this process."""
    return CliRunner().invoke(cli, list(map(str, arguments)))


def process(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command, as a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False, **options)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded checkpoint. Tests that damage one copy it."""
    return tiny_checkpoint(tmp_path_factory.mktemp("cli") / "source", "qwen3_vl", sharded=True)


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "source"))


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def entries(directory: Path) -> list[tuple[str, int]]:
    return sorted((str(p.relative_to(directory)), p.stat().st_mtime_ns) for p in directory.rglob("*"))


def assert_refused(result: Result, *expected: str, code: int = 2) -> None:
    """Exit code and one line on stderr that holds `expected`; no traceback, nothing on stdout."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert all(part in line for part in expected), line


# -- what it prints ----------------------------------------------------------------------------------------------
def test_help_and_version_do_not_import_torch() -> None:
    code = "import sys, cli; cli.cli({!r}, standalone_mode=False); sys.exit('torch' in sys.modules)"
    for arguments in (["--help"], ["patch", "--help"], ["--version"]):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", code.format(arguments)], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "surgeon" in done.stdout
    assert run("--version").stdout == f"surgeon {__version__}\n"


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_every_command_teaches_with_an_example(command: str) -> None:
    assert f"surgeon {command}" in run(command, "--help").stdout.partition("\n")[2]


def test_inspect_json_is_clean(source: Path) -> None:
    done = run("inspect", source, "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["family"] == "qwen3_vl"
    assert found["parameters"] == sum(part["parameters"] for part in found["parts"])


def test_inspect_prints_the_parts_and_where_grafts_go(source: Path) -> None:
    printed = run("inspect", source).stdout
    assert "layers 0 to 3" in printed and "multiples of 16" in printed and "vision tower" in printed
    assert f"{json.loads(run('inspect', source, '--json').stdout)['parameters']:,}" in printed


def test_passes() -> None:
    described = {each["name"]: each["options"] for each in json.loads(run("passes", "--json").stdout)}
    assert {"mixin", "pvm", "rope-dhr"} <= described.keys()
    assert {"layers", "latent"} <= {option["name"] for option in described["pvm"]}
    assert "every:N" in run("passes").stdout


def test_patch_by_arguments_and_by_the_recipe_it_wrote(source: Path, tmp_path: Path) -> None:
    first = run("patch", source, tmp_path / "a", "--pass", PVM, "--seed", 7)
    assert (first.exit_code, first.stderr) == (0, "")
    assert "model.language_model.layers.3.pvm" in first.stdout
    second = run("patch", source, tmp_path / "b", "-r", tmp_path / "a" / "surgeon-recipe.yaml", "--json")
    report = json.loads(second.stdout)
    assert report["seed"] == 7 and report["new_parameters"] == sum(report["grafts"].values()) > 0
    a, b = (load_file(tmp_path / name / "model-pvm.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    other = run("patch", source, tmp_path / "c", "--pass", PVM, "--seed", 8)
    c = load_file(tmp_path / "c" / "model-pvm.safetensors")
    assert other.exit_code == 0 and not all(torch.equal(a[name], c[name]) for name in a)


@pytest.mark.parametrize(
    ("size", "config", "total"), [("8b", QWEN3_VL_8B, "27,922,179"), ("4b", QWEN3_VL_4B, "22,728,963")]
)
def test_dry_run_of_the_published_recipes_counts_the_published_parameters(
    tmp_path: Path, size: str, config: dict[str, Any], total: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    recipe = ROOT / "examples" / "recipes" / f"qwen3-vl-{size}-pvm.yaml"
    result = run("patch", tmp_path, "--recipe", recipe, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert f"total {total} new parameters" in result.stdout
    assert total in recipe.read_text()
    assert [name for name, _ in entries(tmp_path)] == ["config.json"]


def test_dry_run_writes_nothing_and_refuses_a_target_that_exists(source: Path, tmp_path: Path) -> None:
    planned = run("patch", source, tmp_path / "out", "--pass", PVM, "--dry-run", "--json")
    assert json.loads(planned.stdout)["bytes_written"] == 0 and not (tmp_path / "out").exists()
    assert_refused(run("patch", source, tmp_path, "--pass", PVM, "--dry-run"), "exists")


def test_overwrite_replaces_a_target(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    assert_refused(run("patch", source, tmp_path / "out", "--pass", PVM), "exists", "--overwrite")
    assert run("patch", source, tmp_path / "out", "--pass", PVM, "--overwrite").exit_code == 0
    assert not (tmp_path / "out" / "old").exists() and (tmp_path / "out" / "config.json").exists()


@pytest.mark.skipif(not has_tokenizer(), reason="needs the demo checkpoint's tokenizer")
def test_generate_streams_the_answer_of_the_model(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", (96, 64), (200, 30, 30)).save(picture)
    arguments = ("generate", DEMO, "--image", picture, "--prompt", "Describe the picture.", "--max-new-tokens", 12)
    found = json.loads(run(*arguments, "--json").stdout)
    streamed = process(*arguments)  # where nothing has set transformers up before
    assert streamed.stdout == found["text"] + "\n" and streamed.stderr == ""

    # the same by transformers' own greedy search
    from surgeon.inputs import Inputs, Prompt

    prepared = Inputs.from_directory(DEMO).prepare([Prompt("Describe the picture.", (picture,))])
    model = models.load(DEMO)
    ids = model.generate(**prepared.model_kwargs(model.dtype), do_sample=False, max_new_tokens=12)
    assert found["token_ids"] == ids[0, prepared.input_ids.shape[1] :].tolist()

    drawn = [json.loads(run(*arguments, "--json", "--temperature", 5, "--seed", seed).stdout) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert answer(DEMO, Prompt("Describe the picture.", (picture,)), 3).token_ids == found["token_ids"][:3]


@pytest.mark.skipif(not has_tokenizer(), reason="needs the demo checkpoint's tokenizer")
def test_a_bundle_is_exported_inspected_and_answers_as_its_checkpoint(source: Path, tmp_path: Path) -> None:
    patched, bundle, picture = tmp_path / "patched", tmp_path / "bundle", tmp_path / "a.png"
    Image.new("RGB", (96, 64), (200, 30, 30)).save(picture)
    assert run("patch", source, patched, "--pass", PVM).exit_code == 0
    exported = run("export", patched, bundle, "--dtype", "fp32", "--max-length", 64, "--json")
    assert (exported.exit_code, exported.stderr) == (0, "")
    assert json.loads(exported.stdout) == json.loads(run("inspect", bundle, "--json").stdout)
    assert "pvm at layers 1, 3" in run("inspect", bundle).stdout
    assert_refused(run("export", patched, bundle, "--dtype", "fp32"), "exists", "--overwrite")

    asked = ("--image", picture, "--prompt", "Describe the picture.", "--max-new-tokens", 8)
    by_bundle, by_torch = (json.loads(run("generate", path, *asked, "--json").stdout) for path in (bundle, patched))
    assert by_bundle == by_torch
    assert run("generate", bundle, *asked).stdout == by_bundle["text"] + "\n"
    assert_refused(run("generate", bundle, "--prompt", "long " * 100), "64")
    (bundle / "decoder.onnx").unlink()
    assert_refused(run("generate", bundle, *asked), "decoder.onnx is missing")


def test_doctor_prints_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Diagnosis(
        [Package("torch", "2.99", "no libtorch"), Package("triton", None)],
        [Backend("Triton", False, "triton is not installed", "pip install triton")],
        Storage(str(tmp_path), 5_000_000_000, reflink=False, hardlink=True),
    )
    monkeypatch.setattr("surgeon.doctor.diagnose", lambda directory: found)  # its own tests run it
    assert json.loads(run("doctor", "--dir", tmp_path, "--json").stdout) == dataclasses.asdict(found)
    printed = run("doctor", "--dir", tmp_path).stdout
    for expected in (
        "2.99",
        "no libtorch",
        "not installed",
        "Triton: pip install triton",
        "5.0 GB free",
        "hard links: yes",
    ):
        assert expected in printed


# -- bad input ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("pvm:layers=4", ["layer 4 is out of range", "0 to 3"]),
        ("pvm:layers=-1", ["layer -1 is out of range"]),
        ("pvm:layers=1,1", ["layer 1 is named twice"]),
        ("pvm:layers=every:9", ["4 layers"]),
        ("pvm:layers=1,latent=40", ["40", "head_dim 16", "32 or 48"]),
        ("pvm:layers=1,latnet=32", ["unknown option 'latnet'", "'latent'"]),
        ("pvm:latent=32", ["'layers' is required"]),
        ("pvmm:layers=1", ["unknown pass 'pvmm'", "'pvm'"]),
        ("pvm:layers=some", ["'layers'", "every:N"]),
        ("pvm:1", ["option=value"]),
    ],
)
def test_a_pass_that_cannot_be(source: Path, tmp_path: Path, argument: str, expected: list[str]) -> None:
    before = entries(source)
    assert_refused(run("patch", source, tmp_path / "out", "--pass", argument), *expected)
    assert entries(tmp_path) == [] and entries(source) == before


def test_a_pass_that_is_already_applied(source: Path, tmp_path: Path) -> None:
    assert run("patch", source, tmp_path / "once", "--pass", PVM).exit_code == 0
    assert_refused(run("patch", tmp_path / "once", tmp_path / "twice", "--pass", PVM), "already applied")
    twice = run("patch", source, tmp_path / "twice", "--pass", PVM, "--pass", PVM)
    assert_refused(twice, "already applied")
    assert [path.name for path in tmp_path.iterdir()] == ["once"]


def damage_not_a_checkpoint(path: Path) -> None:
    (path / "config.json").unlink()


def damage_family(path: Path) -> None:
    edit(path / "config.json", lambda config: config.update(model_type="llava"))


def damage_truncate(path: Path) -> None:
    shard = sorted(path.glob("*.safetensors"))[-1]
    os.truncate(shard, shard.stat().st_size - 5)


def damage_header(path: Path) -> None:
    shard = sorted(path.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:8] + b"x" + shard.read_bytes()[9:])


def damage_missing_shard(path: Path) -> None:
    sorted(path.glob("*.safetensors"))[0].unlink()


def _point_index_to(path: Path, file: str) -> None:
    def change(index: dict[str, Any]) -> None:
        index["weight_map"][next(iter(index["weight_map"]))] = file

    edit(path / "model.safetensors.index.json", change)


def damage_index_outside(path: Path) -> None:
    _point_index_to(path, "../other.safetensors")


def damage_index_absolute(path: Path) -> None:
    _point_index_to(path, "/other.safetensors")


def damage_disagree(path: Path) -> None:
    edit(path / "config.json", lambda config: config["text_config"].update(intermediate_size=256))


def damage_pickle(path: Path) -> None:
    for file in path.glob("model*"):
        file.unlink()
    (path / "pytorch_model.bin").write_bytes(b"PK")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (damage_not_a_checkpoint, ["is not a checkpoint", "config.json"]),
        (damage_family, ["'llava'", "supported: ", "qwen2_5_vl, qwen3_vl"]),
        (damage_truncate, ["truncated"]),
        (damage_header, ["corrupt"]),
        (damage_missing_shard, ["is missing", "model.safetensors.index.json"]),
        (damage_index_outside, ["outside the directory"]),
        (damage_index_absolute, ["outside the directory"]),
        (damage_disagree, ["128", "the config asks for", "256"]),
        (damage_pickle, ["pickle"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_checkpoint_that_cannot_be_read(
    copy: Path, tmp_path: Path, damage: Callable[[Path], None], expected: list[str]
) -> None:
    damage(copy)
    before = entries(copy)
    assert_refused(run("patch", copy, tmp_path / "out", "--pass", PVM), *expected)
    assert_refused(run("export", copy, tmp_path / "bundle", "--dtype", "fp32"), *expected)
    if damage is not damage_pickle:  # a config is enough to inspect
        assert_refused(run("inspect", copy), *expected)
    assert [path.name for path in tmp_path.iterdir()] == ["source"] and entries(copy) == before


def test_a_directory_that_does_not_exist_in_a_process(tmp_path: Path) -> None:
    done = process("patch", "./nowhere", "out", "--pass", PVM, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no such directory: nowhere\n"
    assert entries(tmp_path) == []


@pytest.mark.skipif(not has_tokenizer(), reason="needs the demo checkpoint's tokenizer")
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.png", b"no picture", "is not a picture"),
        ("a.png", b"\x89PNG\r\n\x1a\n" + b"\0" * 20, "a.png"),
        ("a.mp4", b"\0\0\0 ftypisom", "video is not supported yet"),
        ("a.png", None, "does not exist"),
    ],
)
def test_a_picture_that_is_not_one(tmp_path: Path, name: str, content: bytes | None, expected: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert_refused(run("generate", DEMO, "--image", tmp_path / name, "--prompt", "Describe the picture."), expected)


@pytest.mark.parametrize(
    "arguments",
    [
        ["patch", "{source}", "{out}"],
        ["patch", "{source}", "{out}", "--pass", PVM, "-r", "recipe.yaml"],
        ["patch", "{source}", "--pass", PVM],
        ["patch", "{source}", "{out}", "--pass", PVM, "--weights", "hard"],
        ["export", "{source}", "{out}"],
        ["generate", "{source}", "--prompt", "x", "--top-p", "0.5"],
        ["generate", "{source}", "--prompt", "x", "--temperature", "-1"],
        ["patched"],
    ],
)
def test_wrong_use_exits_2_with_the_usage(source: Path, tmp_path: Path, arguments: list[str]) -> None:
    result = run(*(a.format(source=source, out=tmp_path / "out") for a in arguments))
    assert result.exit_code == 2 and result.stderr.startswith("Usage: ") and result.stdout == ""
    assert entries(tmp_path) == []


def test_a_recipe_that_is_not_one(source: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("passes: [pvm\n")
    assert_refused(run("patch", source, tmp_path / "out", "-r", tmp_path / "recipe.yaml"), "not readable YAML")
    assert_refused(run("patch", source, tmp_path / "out", "-r", tmp_path / "none.yaml"), "does not exist")
    assert not (tmp_path / "out").exists()


# -- faults and interruptions ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("two\nlines"), 3, "error: unexpected RuntimeError: two (run with --debug to see where)"),
        (OSError(28, "No space left on device"), 2, "error: the disk is full"),
    ],
)
def test_what_breaks_half_way_is_one_line_and_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, line: str
) -> None:
    def broken(*_: object) -> None:
        raise raised

    monkeypatch.setattr(surgeon.patch, "write_safetensors", broken)
    result = run("patch", source, tmp_path / "out", "--pass", PVM)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith(line) and result.stderr.count("\n") == 1
    assert entries(tmp_path) == []
    debugged = run("--debug", "patch", source, tmp_path / "out", "--pass", PVM)
    assert debugged.exit_code == code and "Traceback" in debugged.stderr and "in broken" in debugged.stderr


def test_debug_shows_the_traceback_of_a_refusal_in_a_process(tmp_path: Path) -> None:
    done = process("--debug", "inspect", tmp_path)
    assert done.returncode == 2 and "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and "is not a checkpoint" in done.stderr
