"""memory-tokens: new tokens with rows of their own, beside a source of which every row stays what it is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

import passes
import surgeon
from checkpoints import FAMILIES, tiny_checkpoint
from command import process, run
from passes.memory_tokens import MOST, PUBLISHED, MemoryTokens
from patching import apply
from surgeon.checkpoint.reader import Checkpoint
from surgeon.errors import CheckpointError, OptionError, SurgeonError
from surgeon.patch import patch, plan
from surgeon.recipe import FILE_NAME, Recipe
from surgeon.saving import save

TOKENS = "memory-tokens"
TABLES = ("model.language_model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With spare rows, untied, in one file."""
    return tiny_checkpoint(tmp_path_factory.mktemp("tokens") / "source", "qwen3_vl")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without spare rows, tied, in several files."""
    options: dict[str, Any] = {"vocab_size": 639, "tie_word_embeddings": True}
    return tiny_checkpoint(tmp_path_factory.mktemp("tokens") / "small", "qwen3_vl", sharded=True, **options)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    with Checkpoint.open(directory) as checkpoint:
        return {name: checkpoint.read(name).clone() for name in checkpoint.tensors}


def check_rows(source: Path, target: Path, ids: dict[str, int]) -> None:
    """Every tensor and every row of the source is in the target bit for bit, and new rows differ from each other."""
    before, after = tensors(source), tensors(target)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if not name.endswith(("embed_tokens.weight", "lm_head.weight")):
            assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
            continue
        kept = [row for row in range(len(tensor)) if row not in ids.values()]
        assert torch.equal(tensor[kept].view(torch.uint8), after[name][kept].view(torch.uint8)), name
        assert len(after[name]) == max(len(tensor), max(ids.values()) + 1)
        new = after[name][list(ids.values())]
        assert len(torch.unique(new, dim=0)) == len(ids) and new.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options", [{}, {"vocab_size": 645}, {"vocab_size": 645, "tie_word_embeddings": True, "sharded": True}],
    ids=["spare", "grown", "grown, tied, sharded"],
)  # fmt: skip
def test_every_family_gets_rows_and_stays_a_plain_model(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", family, **options)
    report = apply(source, tmp_path / "out", TOKENS)
    check_rows(source, tmp_path / "out", report.tokens)
    assert list(report.tokens) == list(PUBLISHED)
    model, plain = (AutoModelForImageTextToText.from_pretrained(path) for path in (tmp_path / "out", source))
    assert type(model) is type(plain)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer(f"a{PUBLISHED[0]}b", return_tensors="pt")["input_ids"]
    assert report.tokens[PUBLISHED[0]] in ids[0].tolist()
    assert model(input_ids=ids).logits.isfinite().all()
    prompt = tokenizer("Describe the picture", return_tensors="pt")["input_ids"]
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = plain.generate(prompt, **settings)
    if expected.max() < min(report.tokens.values()):  # random spare rows may answer, which no tokenizer could write
        assert torch.equal(model.generate(prompt, **settings), expected)


def test_spare_rows_are_written_in_place_and_nothing_else(source: Path, tmp_path: Path) -> None:
    report = apply(source, tmp_path / "out", TOKENS)
    assert report.tables == dict.fromkeys(TABLES, (2048, 2048)) and report.new_parameters == 0
    assert report.shared == {"model-base.safetensors": "copy and new rows"}
    before = (source / "model.safetensors").read_bytes()
    after = (tmp_path / "out" / "model-base.safetensors").read_bytes()
    assert len(before) == len(after)
    other = sum(a != b for a, b in zip(before, after, strict=True))
    assert 0 < other <= 2 * 5 * 64 * 4
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    record = config.pop("surgeon")
    assert config == json.loads((source / "config.json").read_text())
    assert record["tokens"] == report.tokens and record["source_vocab_size"] == 2048
    assert record["passes"] == [{TOKENS: {"tokens": list(PUBLISHED), "init": "mean", "seed": 0}}]


def test_a_table_grows_in_its_own_file_alone(small: Path, tmp_path: Path) -> None:
    report = apply(small, tmp_path / "out", TOKENS, weights="link")
    assert sorted(report.shared.values()).count("rewriting") == 1
    assert report.grown_parameters == report.new_parameters == 5 * 64
    name = next(name for name, method in report.shared.items() if method == "rewriting")
    for file in small.glob("model-*.safetensors"):
        assert (file.stat().st_ino == (tmp_path / "out" / file.name).stat().st_ino) == (file.name != name)
    with Checkpoint.open(small) as before, Checkpoint.open(tmp_path / "out") as after:
        assert list(before.tensors) == list(after.tensors)  # in the order of the data
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(tmp_path / "out").values())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["vocab_size"] == 644 and "auto_map" not in config
    check_rows(small, tmp_path / "out", report.tokens)


@pytest.mark.parametrize("which", ["source", "small"])
def test_links_never_reach_the_source(which: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source = Path(shutil.copytree(request.getfixturevalue(which), tmp_path / "source"))
    content = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in source.iterdir()}
    apply(source, tmp_path / "out", TOKENS, weights="link")
    assert content == {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in source.iterdir()}


def test_only_the_tokenizer_and_the_config_change_beside_the_weights(source: Path, tmp_path: Path) -> None:
    apply(source, tmp_path / "out", TOKENS)
    same = [file for file in source.iterdir() if (tmp_path / "out" / file.name).is_file()]
    changed = {file.name for file in same if file.read_bytes() != (tmp_path / "out" / file.name).read_bytes()}
    assert changed == {"config.json", "tokenizer.json"}
    before, after = (json.loads((path / "tokenizer.json").read_text()) for path in (source, tmp_path / "out"))
    assert after["added_tokens"][: len(before["added_tokens"])] == before.pop("added_tokens")
    new = after.pop("added_tokens")[-5:]
    assert before == after
    assert [(entry["content"], entry["special"], entry["normalized"]) for entry in new] == [
        (token, True, False) for token in PUBLISHED
    ]


@pytest.mark.parametrize(("init", "row"), [("separator", "\n"), ("copy:a", "a")])
def test_new_rows_are_like_the_row_that_is_named(source: Path, tmp_path: Path, init: str, row: str) -> None:
    report = apply(source, tmp_path / "out", f"{TOKENS}:tokens=<x>,<y>,init={init}", seed=3)
    (like,) = AutoTokenizer.from_pretrained(source)(row)["input_ids"]
    for name in TABLES:
        table = tensors(tmp_path / "out")[name]
        for token_id in report.tokens.values():
            noise = table[token_id] - table[like]
            share = float(noise.square().mean().sqrt() / table[like].square().mean().sqrt())
            assert 5e-4 < share < 2e-3


def test_mean_is_that_of_the_tokenizers_rows_of_each_table(source: Path, tmp_path: Path) -> None:
    report = apply(source, tmp_path / "out", TOKENS)
    for name in TABLES:
        table = tensors(tmp_path / "out")[name].double()
        mean = table[:639].mean(0)
        new = table[list(report.tokens.values())]
        assert torch.allclose(new, mean.expand_as(new), atol=float(mean.square().mean().sqrt()) * 6e-3)


def test_tokens_are_added_twice_in_one_patch_as_in_two(source: Path, tmp_path: Path) -> None:
    second = f"{TOKENS}:tokens=<x>,<y>"
    apply(source, tmp_path / "once", TOKENS, second)
    apply(source, tmp_path / "first", TOKENS)
    apply(tmp_path / "first", tmp_path / "second", second)
    one, two = tensors(tmp_path / "once"), tensors(tmp_path / "second")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert surgeon.load(tmp_path / "second").config.surgeon["tokens"]["<y>"] == 645


@pytest.mark.parametrize("order", [(TOKENS, "pvm:layers=1,latent=32"), ("pvm:layers=1,latent=32", TOKENS)])
def test_beside_grafts_the_class_is_the_patched_one(small: Path, tmp_path: Path, order: tuple[str, str]) -> None:
    apply(small, tmp_path / "both", *order)
    apply(small, tmp_path / "one", order[0])
    apply(tmp_path / "one", tmp_path / "two", order[1])
    for path in (tmp_path / "both", tmp_path / "two"):
        model = surgeon.load(path)
        assert type(model).__name__ == "SurgeonQwen3VLForConditionalGeneration"
        assert model.config.model_type == "surgeon_qwen3_vl" and (path / "modeling_surgeon.py").is_file()
        assert model.config.surgeon["tokens"] == dict(zip(PUBLISHED, range(639, 644), strict=True))
        assert model.get_input_embeddings().weight.shape[0] == 644
    assert not list((tmp_path / "one").glob("*.py")) or order[0] != TOKENS
    one, two = tensors(tmp_path / "both"), tensors(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_written_recipe_makes_the_same_bytes(small: Path, tmp_path: Path) -> None:
    apply(small, tmp_path / "first", f"{TOKENS}:tokens=<x>,<y>,init=separator", seed=7)
    recipe = Recipe.read(tmp_path / "first" / FILE_NAME)
    assert recipe.passes == [{TOKENS: {"tokens": ["<x>", "<y>"], "init": "separator", "seed": 7}}]
    patch(small, tmp_path / "second", recipe.make_passes(passes.registry()), seed=recipe.seed)
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("first", "second")
    )
    assert first == second
    apply(small, tmp_path / "other", f"{TOKENS}:tokens=<x>,<y>,init=separator", seed=8)
    assert not torch.equal(tensors(tmp_path / "other")[TABLES[0]], tensors(tmp_path / "first")[TABLES[0]])


def test_a_flat_config_says_the_new_size_where_it_said_the_old(tmp_path: Path) -> None:
    """As Qwen2.5-VL was published: the text model's values stand at the top."""
    source = tiny_checkpoint(tmp_path / "source", "qwen2_5_vl", vocab_size=640)

    def flatten(config: dict[str, Any]) -> None:
        text = config.pop("text_config")
        config.update({key: value for key, value in text.items() if key != "model_type"})

    edit(source / "config.json", flatten)
    apply(source, tmp_path / "out", TOKENS)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == 644 and "text_config" not in config
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "out").get_input_embeddings().weight.shape[0] == 644


def test_a_head_and_embeddings_stored_twice_stay_equal(small: Path, tmp_path: Path) -> None:
    """Tied, and in the files all the same: with other noise in one of them transformers would untie the two."""
    source = Path(shutil.copytree(small, tmp_path / "source"))
    name = next(file for file in source.glob("model-*") if "embed_tokens" in str(load_file(file).keys()))
    content = load_file(name)
    save_file({**content, TABLES[1]: content[TABLES[0]].clone()}, name, {"format": "pt"})
    edit(source / "model.safetensors.index.json", lambda c: c["weight_map"].update({TABLES[1]: name.name}))
    report = apply(source, tmp_path / "out", TOKENS)
    assert sorted(report.tables) == sorted(TABLES)
    after = tensors(tmp_path / "out")
    assert torch.equal(after[TABLES[0]], after[TABLES[1]])
    check_rows(source, tmp_path / "out", report.tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["tokens"].update({"<mem>": 644}), "gives '<mem>' the id 644, and vocab_size is 644"),
        (lambda r: r["tokens"].update({"<mem>": 639}), "two of tokens have one id"),
        (lambda r: r["tokens"].update({"<mem>": "1"}), "surgeon.tokens.<mem>: "),
        (lambda r: r.update(tokens={}), "surgeon.tokens"),
        (lambda r: r.pop("source_vocab_size"), "tokens and source_vocab_size come together"),
        (lambda r: [r.pop("tokens"), r.pop("source_vocab_size")], "neither grafts nor tile positions nor tokens"),
    ],
)
def test_records_that_cannot_be_are_refused(
    small: Path, tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    apply(small, tmp_path / "out", TOKENS)
    edit(tmp_path / "out" / "config.json", lambda config: change(config["surgeon"]))
    with pytest.raises(CheckpointError) as caught:
        surgeon.load(tmp_path / "out")
    assert message in str(caught.value)


def test_a_patched_model_type_with_tokens_alone_is_refused(small: Path, tmp_path: Path) -> None:
    apply(small, tmp_path / "out", TOKENS)
    edit(tmp_path / "out" / "config.json", lambda config: config.update(model_type="surgeon_qwen3_vl"))
    with pytest.raises(CheckpointError, match="has neither grafts nor tile positions"):
        surgeon.load(tmp_path / "out")


@pytest.mark.parametrize(("init", "text"), [("mean", "never the largest"), ("separator", "answers may hold it")])
def test_the_card_says_which_tokens_there_are(small: Path, tmp_path: Path, init: str, text: str) -> None:
    apply(small, tmp_path / "out", f"{TOKENS}:init={init}")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Tokens" in card and "| `<ms_I>` | 639 | grown |" in card and text in card
    assert "trust_remote_code=True" not in card and "resize_token_embeddings" in card
    apply(tmp_path / "out", tmp_path / "two", "pvm:layers=1,latent=32")
    card = (tmp_path / "two" / "README.md").read_text()
    assert "## Tokens" not in card and "trust_remote_code=True" in card


def test_saved_and_loaded_again_rows_and_record_stay(small: Path, tmp_path: Path) -> None:
    apply(small, tmp_path / "out", TOKENS)
    save(surgeon.load(tmp_path / "out"), tmp_path / "saved", tmp_path / "out")
    expected, actual = tensors(tmp_path / "out")[TABLES[0]], tensors(tmp_path / "saved")[TABLES[0]]
    assert torch.equal(expected, actual)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    model = surgeon.load(tmp_path / "saved")
    assert model.config.surgeon["tokens"] == {t: tokenizer.convert_tokens_to_ids(t) for t in PUBLISHED}


def test_peft_trains_beside_the_rows_and_merges(small: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    apply(small, tmp_path / "out", TOKENS)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    table = tensors(tmp_path / "out")[TABLES[0]]
    assert torch.equal(merged.get_input_embeddings().weight, table)
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert merged.config.surgeon["tokens"][PUBLISHED[0]] == 639
    projection = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(*(tensors(tmp_path / name)[projection] for name in ("merged", "out")))


def test_a_model_in_memory_has_no_tokenizer(source: Path, tmp_path: Path) -> None:
    for model in (source, AutoModelForImageTextToText.from_pretrained(source)):
        with pytest.raises(OptionError, match="tokenizer, which is no part of a model in memory: patch the checkpoint"):
            surgeon.graft(model, MemoryTokens())
    apply(source, tmp_path / "out", TOKENS)
    grafted = surgeon.graft(tmp_path / "out", surgeon.PVM(layers=[1], latent=32))
    assert grafted.config.surgeon["tokens"][PUBLISHED[0]] == 639 and grafted.config.surgeon["grafts"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("tokens=<|im_end|>", "the tokenizer has '<|im_end|>' already, with the id 615; leave it out, or name another"),
        ("tokens=a", "the tokenizer has 'a' already"),
        ("init=copy:<nothing at all>", "'<nothing at all>' is not one token: write init=copy:<one of its tokens>"),
        ("init=zero", "expected mean, separator or copy:<a token of the tokenizer>, found 'zero'"),
        ("init=copy:", "expected mean, separator or copy:"),
        ("tokens=<a>,<a>", "names '<a>' twice"),
        ("tokens=", "names no token"),
        ("tokens=<a\u00a0b>", "cannot be printed"),
        ("token=<a>", "unknown option 'token'; did you mean 'tokens'?"),
        ("seed=-1", "option 'seed'"),
    ],
)
def test_what_cannot_be_done_is_refused_in_words(source: Path, tmp_path: Path, options: str, message: str) -> None:
    with pytest.raises(SurgeonError) as caught:
        apply(source, tmp_path / "out", f"{TOKENS}:{options}")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "names no token"),
        (["<a>", ""], "it is empty"),
        (["   "], "it is empty"),
        ([" <a>"], "there is space around it; write '<a>'"),
        (["<a,b>"], "a comma stands between tokens"),
        (["<a>", 3], "expected tokens with commas between them"),
        (["x" * 257], "it has 257 characters"),
        (["\ud800"], "cannot be printed"),
        ([f"<{number}>" for number in range(MOST + 1)], "names 65,537 tokens, and 65,536 are the most"),
    ],
)
def test_lists_of_tokens_that_are_none(tokens: list[Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        MemoryTokens(tokens)
    assert message in str(caught.value)


def test_added_twice_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(SurgeonError, match="has '<mem>' already, with the id 643"):
        apply(source, tmp_path / "out", TOKENS, f"{TOKENS}:tokens=<x>,<mem>")
    apply(source, tmp_path / "once", TOKENS)
    with pytest.raises(SurgeonError, match="has '<mem>' already, with the id 643"):
        apply(tmp_path / "once", tmp_path / "out", f"{TOKENS}:tokens=<x>,<mem>")


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: [file.unlink() for file in d.glob("tokenizer*")], "has no tokenizer"),
        (lambda d: edit(d / "config.json", lambda c: c.update(vision_end_token_id=641)),
         "'<ml_I>' would get the id 641, which is vision_end_token_id of config.json"),
        (lambda d: edit(d / "generation_config.json", lambda c: c.update(eos_token_id=[615, 640])),
         "'<ms_E>' would get the id 640, which is eos_token_id of generation_config.json"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), "the tokenizer in .* cannot be loaded"),
    ],
    ids=["no tokenizer", "an id of the config", "an id of generation_config.json", "broken"],
)  # fmt: skip
def test_sources_that_cannot_be_extended_are_refused_in_the_plan(
    source: Path, tmp_path: Path, change: Callable[[Path], Any], message: str
) -> None:
    broken = Path(shutil.copytree(source, tmp_path / "source"))
    change(broken)
    with Checkpoint.open(broken) as checkpoint, pytest.raises(SurgeonError, match=f"pass memory-tokens: .*{message}"):
        plan(checkpoint, [MemoryTokens()])


def test_a_tokenizer_of_more_ids_than_rows_is_of_another_model(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl", vocab_size=630)
    with pytest.raises(SurgeonError, match="ids up to 638, and .*embed_tokens.weight has 630 rows"):
        apply(source, tmp_path / "out", TOKENS)


def test_a_plan_without_the_pass_reads_no_tokenizer(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgeon.vocabulary.load_tokenizer", lambda *_: pytest.fail("loaded"))
    with Checkpoint.open(source) as checkpoint:
        plan(checkpoint, [surgeon.PVM(layers=[1], latent=32)])


def test_as_a_command(small: Path, tmp_path: Path) -> None:
    result = run("patch", small, "--pass", TOKENS, "--dry-run")
    assert result.exit_code == 0 and "639 rows, now 644" in result.stdout and "<ms_I> 639" in result.stdout
    result = run("patch", small, tmp_path / "out", "--pass", f"{TOKENS}:tokens=<a>,<b>,init=mean")
    assert result.exit_code == 0 and "by rewriting: model-" in result.stdout
    result = run("inspect", tmp_path / "out")
    assert "tokens   in rows by which the tables grew: <a> 639, <b> 640" in result.stdout
    assert TOKENS in run("passes").stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [("tokens=<|im_end|>", "has '<|im_end|>' already, with the id 615"), ("init=zero", "expected mean, separator or")],
)
def test_refused_by_the_command(small: Path, tmp_path: Path, options: str, message: str) -> None:
    done = process("patch", small, tmp_path / "out", "--pass", f"{TOKENS}:{options}")
    assert done.returncode == 2 and done.stdout == "" and not list(tmp_path.iterdir())
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in line and "Traceback" not in done.stderr
