"""The model card of a patched or imported checkpoint: what the hub reads of it, and what it says comes true."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import passes
from cards import blocks, card_of, section
from checkpoints import has_tokenizer, tiny_checkpoint
from command import run
from hub_stand_in import COMMIT, hub
from pairs import image, open_gates
from passes.pvm import PvmPass
from patching import apply
from published import golden_checkpoint
from surgeon.checkpoint import Checkpoint
from surgeon.checkpoint.hub import hub_origin
from surgeon.graph import LvlmGraph
from surgeon.importing import import_checkpoint
from surgeon.memory.inserted import Constant
from surgeon.patch import patch
from surgeon.pipeline import Pass, PassOptions, PassResult
from surgeon.recipe import Recipe, argument_of, parse_argument
from surgeon.source_card import keep_cards

PVM = "pvm:layers=1,3,latent=32"
needs_tokenizer = pytest.mark.skipif(not has_tokenizer(), reason="needs the demo's tokenizer")

SOURCE_CARD = """\
---
license: other
license_name: example-research
license_link: {link}
language: [en, zh]
base_model: org/ancestor
pipeline_tag: text-generation
tags: [conversational]
metrics: [accuracy]
model-index:
- name: source
  results: []
---

# Their model

It scores 97.3 on everything.
"""


@pytest.fixture(scope="module")
def original_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("card") / "Tiny-VL", "qwen3_vl")


@pytest.fixture
def source(original_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original_checkpoint, tmp_path / "Tiny-VL"))


@pytest.fixture
def snapshot(original_checkpoint: Path, tmp_path: Path) -> Path:
    """The source as it lies in the Hugging Face cache."""
    return Path(shutil.copytree(original_checkpoint, tmp_path / "hub" / "models--org--Tiny-VL" / "snapshots" / COMMIT))


def run_recipe(directory: Path, **places: Path) -> None:
    """Every line of the recipe, as commands, the names in it replaced by places."""
    (block,) = blocks(section(directory, "Recipe"), "bash")
    for line in block.splitlines():
        program, *words = shlex.split(line)
        assert program == "surgeon"
        done = run(*(places.get(word.replace("-", "_").replace("/", "_"), word) for word in words))
        assert done.exit_code == 0, done.output


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# -- metadata -------------------------------------------------------------------------------------------------------
def test_what_the_hub_reads(snapshot: Path, tmp_path: Path) -> None:
    (snapshot / "README.md").write_text(SOURCE_CARD.format(link="LICENSE"))
    (snapshot / "LICENSE").write_text("Research only.")
    apply(snapshot, tmp_path / "out", PVM)
    data = card_of(tmp_path / "out").data.to_dict()
    assert data == {
        "base_model": "org/Tiny-VL",
        "language": ["en", "zh"],
        "library_name": "transformers",
        "license": "other",
        "license_name": "example-research",
        "license_link": "LICENSE",
        "pipeline_tag": "image-text-to-text",
        "tags": ["surgeon", "pvm"],
    }
    text = (tmp_path / "out" / "README.md").read_text()
    assert "[org/Tiny-VL](https://huggingface.co/org/Tiny-VL)" in text and COMMIT in text
    assert "97.3" not in text and str(tmp_path) not in text and "Their model" not in text
    assert "surgeon patch org/Tiny-VL OUT " in text and "surgeon validate org/Tiny-VL OUT\n" in text
    record = json.loads((tmp_path / "out" / "config.json").read_text())["surgeon"]["source"]
    assert (record["name"], record["revision"]) == ("org/Tiny-VL", COMMIT) and record["fingerprint"] in text
    assert run("inspect", tmp_path / "out").exit_code == 0  # which checks the record


def test_a_model_that_is_fetched_from_the_hub_comes_with_its_card(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source / "README.md").write_text(SOURCE_CARD.format(link="LICENSE"))
    (source / "LICENSE").write_text("Research only.")
    with hub("org/Tiny-VL", source, tmp_path / "cache", monkeypatch):
        done = run("patch", "org/Tiny-VL", tmp_path / "out", "--pass", PVM)
    assert done.exit_code == 0, done.output
    data = card_of(tmp_path / "out").data
    assert (data.base_model, data.license, data.license_link) == ("org/Tiny-VL", "other", "LICENSE")
    assert (tmp_path / "out" / "LICENSE").read_text() == "Research only."
    assert (tmp_path / "out" / "README-source.md").read_text().endswith("It scores 97.3 on everything.\n")


@pytest.mark.parametrize(
    "parts",
    [
        ("datasets--org--name", "snapshots", COMMIT),
        ("models--name", "snapshots", COMMIT),
        ("models--org--name", "snapshots", "main"),
        ("models--org--name", "blobs", COMMIT),
        ("models--../x--name", "snapshots", COMMIT),
        ("name",),
    ],
)
def test_other_directories_are_of_no_hub_model(tmp_path: Path, parts: tuple[str, ...]) -> None:
    assert hub_origin(tmp_path.joinpath(*parts)) is None


def test_what_is_not_known_is_not_said(source: Path, tmp_path: Path) -> None:
    apply(source, tmp_path / "out", PVM)
    data = card_of(tmp_path / "out").data.to_dict()
    assert data.keys() == {"library_name", "pipeline_tag", "tags"}
    assert "the source has no model card" in section(tmp_path / "out", "License")
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()


def test_a_source_that_is_no_hub_model_passes_on_what_its_card_names(source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text(
        "---\nbase_model: [org/one, /home/me/two, org/three]\nlicense: mit\n---\n# Mine\n"
    )
    apply(source, tmp_path / "once", PVM)
    apply(tmp_path / "once", tmp_path / "twice", "mixin:every=2")
    for directory in (tmp_path / "once", tmp_path / "twice"):
        data = card_of(directory).data
        assert data.base_model == ["org/one", "org/three"] and data.license == "mit"
    assert "`mit`" in section(tmp_path / "twice", "License")


@pytest.mark.parametrize(("link", "kept"), [("LICENSE", None), ("https://example.org/l", "https://example.org/l")])
def test_a_license_link_leads_somewhere(source: Path, tmp_path: Path, link: str, kept: str | None) -> None:
    (source / "README.md").write_text(SOURCE_CARD.format(link=link))
    apply(source, tmp_path / "out", PVM)
    assert card_of(tmp_path / "out").data.license_link == kept


def test_a_license_that_is_not_copied_is_not_linked(source: Path, tmp_path: Path) -> None:
    """Files of folders within the source stay behind."""
    (source / "legal").mkdir()
    (source / "legal" / "LICENSE").write_text("Research only.")
    (source / "README.md").write_text("---\nlicense: other\nlicense_link: legal/LICENSE\n---\n")
    apply(source, tmp_path / "out", "pvm:layers=1,latent=32")
    assert not (tmp_path / "out" / "legal").exists()
    assert card_of(tmp_path / "out").data.get("license_link") is None


def test_a_license_that_was_not_downloaded_is_linked_on_the_hub(snapshot: Path, tmp_path: Path) -> None:
    (snapshot / "README.md").write_text(SOURCE_CARD.format(link="legal/LICENSE"))
    apply(snapshot, tmp_path / "out", PVM)
    expected = f"https://huggingface.co/org/Tiny-VL/blob/{COMMIT}/legal/LICENSE"
    assert card_of(tmp_path / "out").data.license_link == expected


@pytest.mark.parametrize(
    "broken",
    [
        b"---\nlicense: [mit\n---\n",
        b"---\n- mit\n---\n",
        b"---\nlicense: {mit: yes}\nbase_model: 7\nlanguage: [en, 3]\n---\n",
        b"\xff\xfe\x00",
        b"---\na: " + b"[" * 5000 + b"\n---\n",
        b"",
        b"# No metadata\n",
    ],
    ids=["yaml", "no mapping", "no text", "no utf-8", "deep", "empty", "none"],
)
def test_a_source_card_that_tells_nothing(source: Path, tmp_path: Path, broken: bytes) -> None:
    (source / "README.md").write_bytes(broken)
    apply(source, tmp_path / "out", PVM)
    assert card_of(tmp_path / "out").data.to_dict().keys() == {"library_name", "pipeline_tag", "tags"}
    assert (tmp_path / "out" / "README-source.md").read_bytes() == broken
    assert "names no license" in section(tmp_path / "out", "License")


def test_names_of_files_cannot_end_the_metadata_or_a_block(source: Path, tmp_path: Path) -> None:
    name = "a `b` | <c>\n```\n$(id)\n---\nlicense: mit\n---"
    apply(source.rename(tmp_path / name), tmp_path / "out", PVM)
    card = card_of(tmp_path / "out")
    assert card.data.license is None and card.data.tags == ["surgeon", "pvm"]
    assert "\n## Use\n" in card.text and len(blocks_of_any_fence(card.text)) == 4
    command = shlex.split(blocks_of_any_fence(card.text)[0])
    assert command[:4] == ["surgeon", "patch", name, "OUT"]


def blocks_of_any_fence(text: str) -> list[str]:
    return [match[2] for match in re.finditer(r"^(`{3,})\w+\n(.*?)^\1$", text, re.DOTALL | re.MULTILINE)]


# -- cards of the source --------------------------------------------------------------------------------------------
def test_each_source_s_card_is_kept_beside_the_new_one(source: Path, tmp_path: Path) -> None:
    theirs = SOURCE_CARD.format(link="LICENSE")
    (source / "README.md").write_text(theirs)
    once, twice, thrice = (tmp_path / name for name in ("once", "twice", "thrice"))
    apply(source, once, PVM)
    apply(once, twice, "mixin:every=2")
    assert (once / "README-source.md").read_text() == theirs
    assert (twice / "README-source.md").read_bytes() == (once / "README.md").read_bytes()
    assert (twice / "README-source-2.md").read_text() == theirs
    (twice / "README.md").write_text("mine")
    thrice.mkdir()
    with Checkpoint.open(twice) as checkpoint:
        keep_cards(checkpoint, thrice)
    assert content(thrice) == {
        "README-source.md": b"mine",
        "README-source-2.md": (once / "README.md").read_bytes(),
        "README-source-3.md": theirs.encode(),
    }


# -- recipes --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("model_type", "arguments"),
    [
        ("qwen3_vl", [PVM]),
        ("qwen2_5_vl", ["pvm:layers=every:2,latent=64,visibility=all", "mixin:every=4,intermediate=48"]),
        ("internvl", ["mixin:layers=strided:2,rope_theta=12345.678,eps=3e-7,tiles=memory", "rope-dhr:max_tiles=3"]),
        ("ovis2", ["rope-dhr:tile_order=column"]),
    ],
)
def test_the_recipe_makes_the_same_files(model_type: str, arguments: list[str], tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "Tiny-VL", model_type)
    apply(source, tmp_path / "out", *arguments, seed=7)
    run_recipe(tmp_path / "out", Tiny_VL=source, OUT=tmp_path / "again")
    assert content(tmp_path / "again") == content(tmp_path / "out")
    assert "--pass" in section(tmp_path / "out", "Recipe")


def test_code_of_the_source_is_kept_by_the_recipe_too(source: Path, tmp_path: Path) -> None:
    (source / "theirs.py").write_text("raise SystemExit('run')\n")
    apply(source, tmp_path / "out", PVM, trust_remote_code=True)
    run_recipe(tmp_path / "out", Tiny_VL=source, OUT=tmp_path / "again")
    assert content(tmp_path / "again") == content(tmp_path / "out") and (tmp_path / "again" / "theirs.py").is_file()
    # a later card does not know how the code came here, and names no command that would leave it out
    apply(tmp_path / "out", tmp_path / "later", "mixin:every=2")
    assert "Tiny-VL" not in "".join(blocks(section(tmp_path / "later", "Recipe"), "bash"))


def test_a_second_patch_tells_all_passes_and_both_commands(source: Path, tmp_path: Path) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    apply(source, once, PVM, seed=2)
    apply(once, twice, "mixin:every=2", seed=3)
    done = section(twice, "What was done")
    assert "| source | `once` |" in done and "| which was made of | `Tiny-VL` |" in done
    assert done.index("`pvm`, which the source had already: layers 1, 3; latent 32") < done.index("1. `mixin` (CoMemo")
    assert card_of(twice).data.tags == ["surgeon", "pvm", "mixin"]
    assert "`once`, which had `pvm` already, patched with `mixin`" in card_of(twice).text
    assert "**The new grafts (`mixin`) are not trained.**" in card_of(twice).text
    assert "`--grafts-tuned`" in section(twice, "Validation")
    again = tmp_path / "again"
    again.mkdir()
    run_recipe(twice, Tiny_VL=source, once=again / "once", OUT=again / "twice")
    assert content(again / "twice") == content(twice) and content(again / "once") == content(once)


def test_a_source_that_was_tuned_is_not_made_by_its_recipe(source: Path, tmp_path: Path) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    apply(source, once, PVM)
    open_gates(once)
    apply(once, twice, "mixin:every=2")
    (block,) = blocks(section(twice, "Recipe"), "bash")
    assert len(block.splitlines()) == 1 and block.startswith("surgeon patch once OUT --pass mixin:")
    assert "How the source was made is in its own card" in section(twice, "Recipe")


options = st.dictionaries(
    st.from_regex(r"[a-z_]{1,8}", fullmatch=True),
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=6),
        st.lists(st.integers(), max_size=3),
        st.lists(st.text(max_size=3), max_size=2),
        st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
    ),
    max_size=4,
)


@given(options)
def test_the_short_form_of_options_is_read_back(values: dict[str, Any]) -> None:
    argument = argument_of("name", values)
    if argument is None:
        return
    read = parse_argument(argument)["name"]
    assert read is not None and read.keys() == {key for key, value in values.items() if value is not None}
    for key, text in read.items():
        match values[key]:
            case bool():
                assert text == json.dumps(values[key])
            case int() | float():
                assert type(values[key])(text) == values[key]
            case str():
                assert text == values[key]
            case list():
                assert text == ",".join(map(str, values[key]))
            case other:
                raise AssertionError(f"{other!r} was said as {text!r}")


@pytest.mark.parametrize(
    ("values", "argument"),
    [
        ({"layers": [8, 16], "latent": 512}, "pvm:layers=8,16,latent=512"),
        ({"layers": [3], "visibility": None}, "pvm:layers=3"),
        ({"eps": 1e-6, "on": True}, "pvm:eps=1e-06,on=true"),
        ({}, "pvm"),
        ({"a": "x,b=y"}, None),
        ({"a": " x"}, None),
        ({"a": {"b": 1}}, None),
        ({"a": [[1], {}]}, None),
    ],
)
def test_short_forms(values: dict[str, Any], argument: str | None) -> None:
    assert argument_of("pvm", values) == argument


def test_a_third_patch_names_what_it_knows(tmp_path: Path) -> None:
    """Of the first one the seed is not known any more."""
    tiny_checkpoint(tmp_path / "source", "internvl")
    apply(tmp_path / "source", tmp_path / "once", PVM, seed=2)
    apply(tmp_path / "once", tmp_path / "twice", "mixin:every=2")
    apply(tmp_path / "twice", tmp_path / "thrice", "rope-dhr")
    (block,) = blocks(section(tmp_path / "thrice", "Recipe"), "bash")
    assert block == "surgeon patch twice OUT --pass rope-dhr:tile_order=row --seed 0\n"
    assert "How the source was made is in its own card" in section(tmp_path / "thrice", "Recipe")
    done = section(tmp_path / "thrice", "What was done")
    assert re.findall(r"^1\. `(.+?)`", done, re.MULTILINE) == ["pvm", "mixin", "rope-dhr"]


class MarkOptions(PassOptions):
    marks: dict[str, int] | None = None
    notes: list[str] | None = None
    value: int | str | None = None
    default: int | None = 3


class Mark(Pass):
    name, summary, Options, identity = "mark", "marks a layer", MarkOptions, False

    def rewrite(self, graph: LvlmGraph) -> PassResult:
        return PassResult(modified=True, touched=[])


@pytest.mark.parametrize(
    "options",
    [{"marks": {"a": 1}}, {"notes": ["a"]}, {"notes": ["a,b"]}, {"notes": []}, {"value": 7}, {"default": None}],
)
def test_options_that_the_short_form_cannot_say_are_left_to_the_recipe_file(
    source: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    registry = {**passes.registry(), "mark": Mark}
    recipe = Recipe(seed=4, passes=[{"pvm": {"layers": [1], "latent": 32}}, {"mark": options}])
    patch(source, tmp_path / "out", recipe.make_passes(registry), seed=4)
    (block,) = blocks(section(tmp_path / "out", "Recipe"), "bash")
    assert block == "surgeon patch Tiny-VL OUT --recipe surgeon-recipe.yaml --seed 4\n"
    assert "`mark` is not an identity" in card_of(tmp_path / "out").text


# -- what it says of the model --------------------------------------------------------------------------------------
def test_parameters_are_those_of_the_files(source: Path, tmp_path: Path) -> None:
    apply(source, tmp_path / "out", PVM, "mixin:layers=0")
    new = load_file(tmp_path / "out" / "model-pvm-mixin.safetensors")
    old = load_file(tmp_path / "out" / "model-base.safetensors")
    rows = dict(re.findall(r"^\| (.+?) \| ([\d,]+) \|", section(tmp_path / "out", "Parameters"), re.MULTILINE))
    counts = {name.strip("`"): int(count.replace(",", "")) for name, count in rows.items()}
    assert counts.pop("backbone") == (backbone := sum(tensor.numel() for tensor in old.values()))
    assert counts.pop("all grafts") == (added := sum(tensor.numel() for tensor in new.values()))
    assert counts == {
        graft: sum(tensor.numel() for name, tensor in new.items() if name.startswith(f"{graft}."))
        for graft in (f"model.language_model.layers.{place}" for place in ("0.mixin", "1.pvm", "3.pvm"))
    }
    assert f"| all grafts | {added:,} | {added / backbone:.2%} |" in section(tmp_path / "out", "Parameters")


@pytest.mark.parametrize(
    ("arguments", "identity", "sentence"),
    [
        (["mixin"], True, "(`mixin`) are not trained"),
        (["mixin:tiles=context"], True, "(`mixin`) are not trained"),
        (["mixin:tiles=memory"], False, "into the memory alone"),
        (["rope-dhr"], False, "`rope-dhr` is not an identity"),
        (["mixin", "rope-dhr"], False, "`rope-dhr` is not an identity"),
    ],
)
def test_identity_is_claimed_of_what_is_one(
    tmp_path: Path, arguments: list[str], identity: bool, sentence: str
) -> None:
    apply(tiny_checkpoint(tmp_path / "Tiny-VL", "internvl"), tmp_path / "out", *arguments)
    text = card_of(tmp_path / "out").text
    assert sentence in text and ("bit for bit" in text) == identity
    comparable = "surgeon validate Tiny-VL OUT" in text
    assert comparable == ("memory alone" not in sentence)


class Open(PvmPass):
    name, identity = "open", False

    def rewrite(self, graph: LvlmGraph) -> PassResult:
        result = super().rewrite(graph)
        for name, plan in graph.new_parameters().items():
            if name.endswith(".alpha"):
                graph.weights[name] = replace(plan, initialiser=Constant(0.5))
        return result


def test_closed_gates_are_claimed_of_what_has_them(source: Path, tmp_path: Path) -> None:
    patch(source, tmp_path / "out", [Open(Open.Options(layers=[1], latent=32))])
    text = card_of(tmp_path / "out").text
    assert "Not all of their gates are zero" in text and "bit for bit" not in text
    assert "`open` is not an identity" in text


@needs_tokenizer
def test_the_validation_that_it_names_passes(source: Path, tmp_path: Path) -> None:
    apply(source, tmp_path / "out", PVM)
    ((line,),) = (block.splitlines() for block in blocks(section(tmp_path / "out", "Validation"), "bash"))
    places = {"Tiny-VL": source, "OUT": tmp_path / "out"}
    done = run(*(places.get(word, word) for word in shlex.split(line)[1:]), "--steps", 2, "--bytes")
    assert done.exit_code == 0, done.output


# -- how it is used -------------------------------------------------------------------------------------------------
def run_use(directory: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The Python of the card, where it would be typed. -> its names."""
    image(60, 60).save(directory.parent / "image.png")
    monkeypatch.chdir(directory.parent)
    (block,) = blocks(section(directory, "Use"), "python")
    names: dict[str, Any] = {}
    exec(compile(block.replace('"OUT"', f'"{directory.name}"').replace("=64", "=2"), "README.md", "exec"), names)
    return names


@needs_tokenizer
@pytest.mark.parametrize(
    ("model_type", "arguments"),
    [
        ("ovis2", ["mixin:every=2"]),
        ("internvl", ["rope-dhr", "mixin:every=2,tiles=context"]),
        ("internvl", ["mixin:tiles=memory"]),
    ],
)
def test_its_python_answers(
    model_type: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply(tiny_checkpoint(tmp_path / "source", model_type), tmp_path / "patched", *arguments)
    names = run_use(tmp_path / "patched", monkeypatch)
    assert type(names["model"]).__name__ == "SurgeonModel" and names["output"].shape[0] == 1
    assert blocks(section(tmp_path / "patched", "Use"), "bash") == [
        "surgeon generate OUT --image image.png --prompt 'Describe the image.'\n"
    ]


@needs_tokenizer
def test_its_python_answers_with_torchvision(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    apply(source, tmp_path / "patched", PVM)
    assert run_use(tmp_path / "patched", monkeypatch)["output"].shape[0] == 1


# -- imports --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["internvl2", "comemo"])
def test_an_imported_checkpoint_has_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = golden_checkpoint(tmp_path / "Their-VL", name)
    (source / "README.md").write_text("---\nlicense: mit\n---\n# Theirs\n")
    report = import_checkpoint(source, tmp_path / "out", image_token_id=500)
    card = card_of(tmp_path / "out")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "image-text-to-text",
        "tags": ["surgeon"] if name == "internvl2" else ["surgeon", "mixin", "rope-dhr"],
    }
    assert "from the layout `internvl_chat` to" in card.text or "from the layout `comemo_chat` to" in card.text
    assert ("- `tiles`: scheme rope_dhr; tile_order column" in card.text) == (name == "comemo")
    assert ("Beside a plain backbone" in card.text) == (name == "comemo") == ("trust_remote_code=True" in card.text)
    assert "not trained" not in card.text and "evaluated nothing" not in card.text.split("## Validation")[0]
    assert (tmp_path / "out" / "README-source.md").read_text().endswith("# Theirs\n")
    rows = re.findall(r"^\| (?:backbone|all grafts) \| ([\d,]+) \|", card.text, re.MULTILINE)
    assert sum(int(count.replace(",", "")) for count in rows) == report.parameters
    run_recipe(tmp_path / "out", Their_VL=source, OUT=tmp_path / "again")
    assert content(tmp_path / "again") == content(tmp_path / "out")
    model = run_use(tmp_path / "out", monkeypatch)["model"]
    assert type(model).__name__ == ("SurgeonModel" if name == "comemo" else "InternVLForConditionalGeneration")
    assert model.dtype == torch.float32


def test_an_imported_checkpoint_that_is_patched(tmp_path: Path) -> None:
    source = golden_checkpoint(tmp_path / "Their-VL", "comemo")
    import_checkpoint(source, tmp_path / "imported", image_token_id=500)
    apply(tmp_path / "imported", tmp_path / "out", "pvm:layers=1,latent=32")
    text = card_of(tmp_path / "out").text
    assert "`imported`, which had `mixin` and `rope-dhr` already, patched with `pvm`" in text
    assert "(`pvm`) are not trained" in text and "How the source was made" not in text
    assert (tmp_path / "out" / "README-source.md").read_bytes() == (tmp_path / "imported" / "README.md").read_bytes()
