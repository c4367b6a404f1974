"""The pass vismem: what it refuses, what it records, and a record that was damaged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from checkpoints import FAMILIES, has_tokenizer, tiny_checkpoint
from command import assert_refused, entries, run
from patching import apply
from surgeon import models
from surgeon.errors import CheckpointError, OptionError
from surgeon.memory.patched import RECORD
from surgeon.pipeline import PreconditionError
from surgeon.recipe import FILE_NAME
from vismem_models import VISMEM

pytestmark = pytest.mark.skipif(not has_tokenizer(), reason="needs the demo checkpoint's tokenizer")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("plain") / "source", "qwen3_vl")


@pytest.fixture(scope="module")
def patched(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vismem") / "out"
    apply(plain, out, "memory-tokens", VISMEM, seed=3)
    return out


def record_of(checkpoint: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())[RECORD]
    return record


# -- refusals -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("passes", "expected"),
    [
        (
            ["vismem"],
            "pass vismem needs the token '<ms_I>', which no pass has added: put --pass memory-tokens before it",
        ),
        (
            ["memory-tokens:tokens=<a>,<b>,<c>,<d>,<e>", "vismem"],
            "needs the token '<ms_I>', which no pass has added; the checkpoint's are <a>, <b>, <c>, <d>, <e>:",
        ),
        (["vismem", "memory-tokens"], "put --pass memory-tokens before it"),
        (
            ["memory-tokens", "vismem:tokens=<ms_I>,<ms_E>,<ms_I>,<ml_E>,<mem>"],
            "pass vismem: tokens names '<ms_I>' twice; each has a part of its own",
        ),
        (
            ["memory-tokens", "vismem:targets=q_proj,qkv"],
            "pass vismem: targets: no linear layer is called qkv; there are mlp.down_proj, mlp.gate_proj, mlp.up_proj, "
            "self_attn.k_proj, self_attn.o_proj, self_attn.q_proj, self_attn.v_proj",
        ),
        (
            ["memory-tokens", "vismem:vision_targets=q_proj"],
            "pass vismem: vision_targets: no linear layer is called q_proj; there are attn.proj, attn.qkv, ",
        ),
        (
            ["memory-tokens", "vismem:short_former=language,vision_targets=qkv"],
            "pass vismem: vision_targets is of short_former=vision; leave it out",
        ),
        (
            ["memory-tokens", "vismem:query=8,window=1785"],
            "window=1785 leaves a query of 2048 positions too little room",
        ),
        (["memory-tokens", "vismem:layers=2,4"], "vismem"),
        (["memory-tokens", "vismem:layers=last:5"], "vismem"),
        (["memory-tokens", "vismem", "vismem"], "pass vismem is already applied; patch the unpatched checkpoint"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(plain: Path, tmp_path: Path, passes: list[str], expected: str) -> None:
    before = entries(plain)
    with pytest.raises(PreconditionError) as error:
        apply(plain, tmp_path / "out", *passes)
    assert expected in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists() and entries(plain) == before


@pytest.mark.parametrize(
    ("option", "key"),
    [
        ("query=0", "query"),
        ("query=257", "query"),
        ("short=0", "short"),
        ("long=1025", "long"),
        ("rank=0", "rank"),
        ("alpha=inf", "alpha"),
        ("window=0", "window"),
        ("width=12", "width"),
        ("short_former=audio", "short_former"),
        ("tokens=<a>,<b>", "tokens"),
        ("latents=3", "latents"),
    ],
)
def test_options_out_of_range_are_refused_by_name(plain: Path, tmp_path: Path, option: str, key: str) -> None:
    with pytest.raises(OptionError, match=key) as error:
        apply(plain, tmp_path / "out", "memory-tokens", f"vismem:{option}")
    assert "\n" not in str(error.value)


def test_the_largest_window_is_taken(plain: Path, tmp_path: Path) -> None:
    apply(plain, tmp_path / "out", "memory-tokens", "vismem:query=8,window=1784,layers=1")
    assert models.load(tmp_path / "out").model.vismem.query_builder.max_hidden_states == 2040


def test_a_patched_checkpoint_is_not_patched_again(patched: Path, tmp_path: Path) -> None:
    assert_refused(run("patch", patched, tmp_path / "out", "--pass", "vismem"), "patch")
    assert not (tmp_path / "out").exists()


def test_a_hidden_size_that_heads_cannot_share(tmp_path: Path) -> None:
    sizes = {"hidden_size": 60, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 16}
    source = tiny_checkpoint(tmp_path / "source", "internvl", **sizes)
    with pytest.raises(PreconditionError, match="hidden_size 60 is not divisible by the .* give it .* width=64$"):
        apply(source, tmp_path / "out", "memory-tokens", "vismem:layers=1")
    apply(source, tmp_path / "out", "memory-tokens", "vismem:layers=1,width=64")
    assert models.load(tmp_path / "out").model.vismem.query_builder.enter.weight.shape == (64, 60)


# -- what it records ----------------------------------------------------------------------------------------------
def test_defaults(plain: Path, tmp_path: Path) -> None:
    apply(plain, tmp_path / "out", "memory-tokens", "vismem")
    record = record_of(tmp_path / "out")
    entry = record["vismem"]
    assert {name: entry[name] for name in ("query", "short", "long", "rank", "alpha", "window", "width")} == {
        "query": 8, "short": 8, "long": 16, "rank": 16, "alpha": 32.0, "window": 1024, "width": None,
    }  # fmt: skip
    assert entry["layers"] == [0, 1, 2, 3] and entry["short_former"] == "vision"
    ids = [*entry["token_ids"]["short"], *entry["token_ids"]["long"], entry["token_ids"]["placeholder"]]
    assert ids == [record["tokens"][token] for token in ("<ms_I>", "<ms_E>", "<ml_I>", "<ml_E>", "<mem>")]


def test_tokens_of_other_names_have_the_parts_that_they_are_named_for(plain: Path, tmp_path: Path) -> None:
    apply(
        plain,
        tmp_path / "out",
        "memory-tokens:tokens=<a>,<b>,<c>,<d>,<e>",
        "vismem:tokens=<e>,<d>,<c>,<b>,<a>,layers=1",
    )
    tokens, memory = record_of(tmp_path / "out")["tokens"], models.load(tmp_path / "out").memory_tokens
    assert (memory.invoke["short"], memory.end["short"]) == (tokens["<e>"], tokens["<d>"])
    assert (memory.invoke["long"], memory.end["long"]) == (tokens["<c>"], tokens["<b>"])
    assert memory.placeholder == tokens["<a>"]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_recipe_gives_the_same_files_again(model_type: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", model_type)
    apply(
        source,
        tmp_path / "out",
        "memory-tokens:init=separator",
        f"{VISMEM},targets=q_proj,down_proj".replace("targets=q_proj,down_proj", "alpha=3.5"),
        seed=5,
    )
    recipe = yaml.safe_load((tmp_path / "out" / FILE_NAME).read_text())
    assert recipe["passes"] == record_of(tmp_path / "out")["passes"]
    assert run("patch", source, tmp_path / "again", "-r", tmp_path / "out" / FILE_NAME).exit_code == 0
    first, second = (
        {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        for folder in (tmp_path / "out", tmp_path / "again")
    )
    assert first == second


def test_another_seed_gives_other_values(plain: Path, patched: Path, tmp_path: Path) -> None:
    apply(plain, tmp_path / "out", "memory-tokens", VISMEM, seed=4)
    one, other = (models.load(path).model.vismem.state_dict() for path in (patched, tmp_path / "out"))
    for name, tensor in one.items():
        constant = tensor.ndim == 1 or name.endswith("expand.weight")
        assert torch.equal(tensor, other[name]) == constant, name


def test_dry_run_and_inspect_say_what_is_there(plain: Path, patched: Path, tmp_path: Path) -> None:
    passes = ("--pass", "memory-tokens", "--pass", VISMEM)
    planned = json.loads(run("patch", plain, tmp_path / "out", *passes, "--dry-run", "--json").stdout)
    assert not (tmp_path / "out").exists()
    count = sum(parameter.numel() for parameter in models.load(patched).model.vismem.parameters())
    assert planned["grafts"] == {"model.vismem": count}
    inspected = json.loads(run("inspect", patched, "--json").stdout)
    assert inspected["parameters"] == sum(part["parameters"] for part in inspected["parts"])
    assert inspected["parameters"] == sum(parameter.numel() for parameter in models.load(patched).parameters())
    assert [token["text"] for token in inspected["tokens"]] == ["<ms_I>", "<ms_E>", "<ml_I>", "<ml_E>", "<mem>"]


# -- records that were damaged ------------------------------------------------------------------------------------
def change(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply_to(entry: Any) -> None:
        for key in path[:-1]:
            entry = entry[key]
        if value is ...:
            del entry[path[-1]]
        else:
            entry[path[-1]] = value

    return apply_to


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (change("query", value="4"), "surgeon.vismem.query"),
        (change("query", value=...), "surgeon.vismem.query"),
        (change("short", value=0), "surgeon.vismem.short"),
        (change("long", value=True), "surgeon.vismem.long"),
        (change("rank", value=-1), "surgeon.vismem.rank"),
        (change("alpha", value=0), "surgeon.vismem.alpha"),
        (change("alpha", value="inf"), "surgeon.vismem.alpha"),
        (change("short_former", value="audio"), "surgeon.vismem.short_former"),
        (change("layers", value=[]), "surgeon.vismem.layers"),
        (change("layers", value=[1, 1]), "surgeon.vismem: layers [1, 1]"),
        (change("layers", value=[1, 4]), "surgeon.vismem: layers [1, 4]"),
        (change("layers", value=[-1]), "surgeon.vismem.layers"),
        (
            change("targets", value=["nothing"]),
            "surgeon.vismem: targets: no linear layer is called nothing; there are mlp.",
        ),
        (change("targets", value="q_proj"), "surgeon.vismem.targets"),
        (
            change("vision_targets", value=["nothing"]),
            "surgeon.vismem: targets: no linear layer is called nothing; there are attn.",
        ),
        (change("alpha", value=2.5), None),
        (change("window", value=4096), "surgeon.vismem: window 4096"),
        (change("window", value=2043), "surgeon.vismem: window 2043"),
        (change("window", value=2042), None),
        (change("width", value=12), "surgeon.vismem: the query builder's width 12"),
        (change("position_axes", value=1), "surgeon.vismem: position_axes is 1"),
        (change("position_axes", value=2), "surgeon.vismem.position_axes"),
        (change("token_ids", "short", value=[639]), "surgeon.vismem.token_ids.short"),
        (change("token_ids", "long", value=[641, 639]), "surgeon.vismem: token_ids"),
        (change("token_ids", "placeholder", value=1 << 20), "surgeon.vismem: token_ids"),
        (change("token_ids", "placeholder", value=-1), "surgeon.vismem.token_ids.placeholder"),
        (change("separators", value=None), "surgeon.vismem.separators"),
        (change("unknown", value=1), "surgeon.vismem.unknown"),
    ],
)
def test_a_damaged_record_is_refused_with_its_key(
    patched: Path, tmp_path: Path, damage: Callable[[dict[str, Any]], None], expected: str | None
) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in patched.iterdir():
        (damaged / file.name).symlink_to(file)
    config = json.loads((patched / "config.json").read_text())
    damage(config[RECORD]["vismem"])
    (damaged / "config.json").unlink()
    (damaged / "config.json").write_text(json.dumps(config))
    if expected is None:
        models.load(damaged)
        return
    with pytest.raises(CheckpointError) as error:
        models.load(damaged)
    assert expected in str(error.value) and "\n" not in str(error.value)
    assert_refused(run("inspect", damaged), expected)


def test_what_is_recorded_and_what_is_stored_are_held_against_each_other(patched: Path, tmp_path: Path) -> None:
    """A record of other sizes than the tensors'."""
    config = json.loads((patched / "config.json").read_text())
    config[RECORD]["vismem"]["rank"] = 8
    for file in patched.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"vismem\.long.*weight is \[32, 4\], the config asks for \[32, 8\]"):
        models.load(tmp_path)


def test_a_model_in_memory_is_refused_in_one_line(plain: Path, tmp_path: Path) -> None:
    """Also one that has the tokens already: its classes are made when it is loaded."""
    import surgeon
    from passes.memory_tokens import MemoryTokens
    from passes.vismem import VisMem

    with pytest.raises(OptionError, match="the passes change the tokenizer"):
        surgeon.graft(plain, MemoryTokens(), VisMem(layers=[1]))
    apply(plain, tmp_path / "tokens", "memory-tokens")
    for model in (tmp_path / "tokens", models.load(tmp_path / "tokens")):
        with pytest.raises(OptionError, match="patch the checkpoint") as error:
            surgeon.graft(model, VisMem(layers=[1]))
        assert "\n" not in str(error.value)
