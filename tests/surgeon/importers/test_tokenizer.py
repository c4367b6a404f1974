"""Tokenizers that come along: sentencepiece's ids, added tokens where they were, prompts as the published chat."""

import io
import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from checkpoints import DEMO
from published import golden_checkpoint
from surgeon import models
from surgeon.errors import CheckpointError, OptionError
from surgeon.importers import _sentencepiece
from surgeon.importing import import_checkpoint
from surgeon.inputs import Inputs, Prompt

IMAGE, START, END = "<IMG_CONTEXT>", "<img>", "</img>"
SYSTEM = "You see images."
# InternLM2's way: chat tokens in the places of unused pieces, InternVL's image tokens behind the last piece.
ADDED = {3: "<|im_start|>", 4: "<|im_end|>", 500: IMAGE, 501: START, 502: END}
INTERNLM2 = {
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "user_defined_symbols": ["[UNUSED_TOKEN_0]", "[UNUSED_TOKEN_1]", "[UNUSED_TOKEN_2]"],
}
LLAMA = {
    "normalization_rule_name": "identity",
    "add_dummy_prefix": True,
    "remove_extra_whitespaces": False,
    "split_digits": True,
}
KINDS: dict[str, dict[str, Any]] = {"internlm2": INTERNLM2, "llama": LLAMA, "sentencepiece's defaults": {}}
# a word that no merge may touch, behind which sentencepiece puts no further dummy prefix
INEXACT = {**LLAMA, "user_defined_symbols": ["----"]}


@cache
def sentencepiece_model(kind: str, model_type: str = "bpe") -> bytes:
    """A tokenizer.model of 500 pieces, 256 of them bytes."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py")))
    lines = [*text.splitlines(), *_sentencepiece.SAMPLES, *(" " * n + "x" for n in range(9)), "aaaaaaaa ------"] * 3
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=500,
        model_type=model_type,
        byte_fallback=True,
        character_coverage=0.98,
        minloglevel=2,
        **{**KINDS, "inexact": INEXACT}[kind],
    )
    return model.getvalue()


def write_internlm2(directory: Path, **settings: Any) -> Path:
    """An InternLM2 tokenizer's files, code included that must not be run."""
    (directory / "tokenizer.model").write_bytes(sentencepiece_model("internlm2"))
    (directory / "tokenization_internlm2.py").write_text("raise SystemExit('run')")
    (directory / "added_tokens.json").write_text(json.dumps({token: i for i, token in ADDED.items()}))
    (directory / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": list(ADDED.values())}))
    config = {
        "tokenizer_class": "InternLM2Tokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "chat_template": "not for images",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
        "added_tokens_decoder": {"1": {"content": "<s>", "special": True}, "2": {"content": "</s>", "special": True}},
        "model_max_length": 8192,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, **settings}))
    return directory


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    source = write_internlm2(golden_checkpoint(directory / "source"))
    (source / "conversation.py").write_text(
        "raise SystemExit('run')\n"
        "register_conv_template(Conversation(name='internlm2-chat', "
        "system_template='<|im_start|>system\\n{system_message}', "
        f"system_message={SYSTEM!r}, roles=('<|im_start|>user\\n', '<|im_start|>assistant\\n'), "
        "sep_style=SeparatorStyle.MPT, sep='<|im_end|>'))\n"
    )
    report = import_checkpoint(source, directory / "out")
    assert (report.image_token_id, report.warnings) == (500, [])
    return directory / "out"


# -- sentencepiece -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_encodes_and_decodes_as_sentencepiece(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(sentencepiece_model(kind))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(file))
    by_table = bool(
        sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes()).normalizer_spec.precompiled_charsmap
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        converted = _sentencepiece.convert(file, {})
    assert [True for each in told if "normalises text by a table" in str(each.message)] == [True] * by_table
    control = st.sampled_from("\n\t\r\0\x01\u200d\ufffd" if not by_table else "\n\t\0\x01\ufffd")
    words = st.sampled_from(["the", "def ", "import", "  ", " ", "aaa", "----", "0x7f", "图片", "é", "🙂"])
    # with a table, what makes one cluster of several characters is left out, as far as Unicode's categories tell it:
    # the same texts every time, then
    characters = st.characters(exclude_categories=["Cs", *["Mn", "Mc", "Me", "Cf", "Sk"] * by_table])

    @settings(derandomize=by_table)
    @given(st.lists(st.one_of(words, characters, control), max_size=40).map("".join))
    def check(text: str) -> None:
        ids = reference.encode(text)
        assert converted.encode(text, add_special_tokens=False).ids == ids
        assert converted.decode(ids) == reference.decode(ids)

    check()
    for code in (*range(1, 0x300), *range(0x2000, 0x2100), 0x3000, 0xFEFF):  # whatever may pass for a space
        for text in (chr(code), f" {chr(code)} a{chr(code)}"):
            assert converted.encode(text, add_special_tokens=False).ids == reference.encode(text), hex(code)
    for run in (" ", "a", "-", "\n", "图"):
        for n in range(1, 40):
            assert converted.encode(run * n, add_special_tokens=False).ids == reference.encode(run * n)


def test_what_cannot_be_had_exactly_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(sentencepiece_model("internlm2", model_type="unigram"))
    with pytest.raises(CheckpointError, match="no sentencepiece BPE model"):
        _sentencepiece.convert(file, {})
    file.write_bytes(sentencepiece_model("inexact"))
    with pytest.raises(CheckpointError, match="cannot be converted exactly: 'aaa"):
        _sentencepiece.convert(file, {})
    file.write_bytes(b"\xff\xff not a model")
    with pytest.raises(CheckpointError, match="cannot be read as a sentencepiece model"):
        _sentencepiece.convert(file, {})
    file.write_bytes(sentencepiece_model("internlm2"))
    piece = sentencepiece.SentencePieceProcessor(model_file=str(file)).id_to_piece(450)
    with pytest.raises(CheckpointError, match="is added with id 500, and has id 450"):
        _sentencepiece.convert(file, {500: AddedToken(piece)})


# -- in a checkpoint ---------------------------------------------------------------------------------------------
def test_added_tokens_keep_their_ids(imported: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(imported)
    reference = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model("internlm2"))
    text = f"<|im_start|>user\n{START}{IMAGE}{IMAGE}{END}\nWhat  is this?<|im_end|>"
    expected = [1, 3, *reference.encode("user\n"), 501, 500, 500, 502, *reference.encode("\nWhat  is this?"), 4]
    assert tokenizer(text)["input_ids"] == expected
    assert tokenizer.decode(expected[1:]) == text
    assert tokenizer.decode(expected, skip_special_tokens=True) == "user\n\nWhat  is this?"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    # what transformers' own processor asks the tokenizer for
    assert (tokenizer.start_image_token, tokenizer.end_image_token, tokenizer.context_image_token) == (
        START,
        END,
        IMAGE,
    )
    assert tokenizer.context_image_token_id == 500
    assert len(tokenizer) <= 600 and tokenizer.video_token_id < 600
    assert not list(imported.glob("*.py")) and not (imported / "tokenizer.model").exists()


def test_a_prompt_is_what_the_published_chat_makes_of_it(imported: Path) -> None:
    inputs = Inputs.from_directory(imported)
    wide, square = Image.new("RGB", (256, 128), (200, 30, 30)), Image.new("RGB", (64, 64))
    batch = inputs.prepare([Prompt("What is this?", (wide, square))])
    assert batch.grids == [[(1, 1, 2), (1, 1, 1)]]

    tokenizer = AutoTokenizer.from_pretrained(imported)
    images = "".join(f"{START}{IMAGE * 256 * tiles}{END}\n" for tiles in (3, 1))
    text = (
        f"<|im_start|>system\n{SYSTEM}<|im_end|><|im_start|>user\n{images}What is this?<|im_end|>"
        "<|im_start|>assistant\n"
    )
    assert batch.input_ids[0].tolist() == tokenizer(text)["input_ids"]
    assert batch.input_ids[0, 0] == 1 and (batch.input_ids[0] == 1).sum() == 1
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    red = (np.array([200, 30, 30]) / 255 - mean) / std
    np.testing.assert_allclose(batch.pixel_values[0][0][2, :, 5, 5], red, atol=1e-5)

    assert 4 in inputs.eos_token_ids and 2 in inputs.eos_token_ids
    own = inputs.prepare([Prompt("Hi", system="Be short.")]).input_ids[0]
    said = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(said, add_generation_prompt=True)["input_ids"] == own.tolist()
    assert inputs.decode(own, skip_special_tokens=False).startswith("<s><|im_start|>system\nBe short.<|im_end|>")
    with torch.no_grad():
        logits = models.load(imported)(**batch.model_kwargs()).logits
    assert logits.isfinite().all()


def test_qwen2_tokenizers_in_both_forms(tmp_path: Path) -> None:
    """Qwen2's tokenizer as vocab.json and merges.txt, and as a tokenizer.json, tokens added behind the last."""
    content = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    reference = PreTrainedTokenizerFast.from_pretrained(DEMO)
    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    assert len(vocab) < 2048
    first = max(len(reference), max(vocab.values()) + 1)
    taken = {token["id"] for token in content["added_tokens"]}

    def grow(config: dict[str, Any]) -> None:
        config["llm_config"]["vocab_size"] = first + 3

    def grow_tensors(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("language_model.model.tok_embeddings.weight", "language_model.output.weight"):
            tensors[name] = torch.zeros(first + 3, 64)

    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    added |= {IMAGE: first, START: first + 1, END: first + 2}
    for kind in ("files", "json"):
        source = golden_checkpoint(tmp_path / kind / "source", change=grow, change_tensors=grow_tensors)
        settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": reference.eos_token, "pad_token": None}
        if kind == "files":
            own = {token: i for token, i in vocab.items() if i not in taken}
            (source / "vocab.json").write_text(json.dumps(own))
            (source / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
            (source / "added_tokens.json").write_text(json.dumps(added))
        else:
            entries = [
                {"id": i, "content": t, "special": i < first, "normalized": False}
                | dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
                for t, i in added.items()
            ]
            (source / "tokenizer.json").write_text(json.dumps({**content, "added_tokens": entries}))
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
        assert import_checkpoint(source, tmp_path / kind / "out").image_token_id == first
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / kind / "out")
        written = json.loads((tmp_path / kind / "out" / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
        assert {entry["content"] for entry in written if entry["special"]} >= {IMAGE, START, END}
        for text in ("a red circle", "Hello,  world!\n12", "图片"):
            ids = tokenizer(f"{START}{text}")["input_ids"]
            assert ids == [first + 1, *reference(text)["input_ids"]], kind
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


# -- what cannot be ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"added_tokens.json": {"<|im_start|>": 3}}, "no <IMG_CONTEXT>"),
        ({"added_tokens.json": {"<IMG_CONTEXT>": 600}}, "id 600, outside the vocabulary of 600"),
        ({"added_tokens.json": {"<IMG_CONTEXT>": 1}}, "id 1 to"),
        ({"tokenizer_config.json": ["not an object"]}, "tokenizer_config.json holds a JSON list"),
    ],
)
def test_a_tokenizer_that_is_not_internvls(tmp_path: Path, files: dict[str, Any], reason: str) -> None:
    source = write_internlm2(golden_checkpoint(tmp_path / "in" / "source"))
    for name, content in files.items():
        (source / name).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=reason):
        import_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_id_that_contradicts_the_tokenizer(tmp_path: Path) -> None:
    source = write_internlm2(golden_checkpoint(tmp_path / "source"))
    with pytest.raises(OptionError, match="499 was asked for, and the tokenizer gives <IMG_CONTEXT> id 500"):
        import_checkpoint(source, tmp_path / "out", image_token_id=499)


def test_an_unknown_template_is_a_warning(tmp_path: Path) -> None:
    source = golden_checkpoint(tmp_path / "source", change=lambda config: config.update(template="unheard-of"))
    report = import_checkpoint(write_internlm2(source), tmp_path / "out")
    assert any("'unheard-of'" in warning for warning in report.warnings)
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


def test_without_a_bos_token(tmp_path: Path) -> None:
    source = write_internlm2(golden_checkpoint(tmp_path / "source"), add_bos_token=False)
    import_checkpoint(source, tmp_path / "out")
    (row,) = Inputs.from_directory(tmp_path / "out").prepare([Prompt("Hi")]).input_ids
    assert row[0] == 3 and 1 not in row
