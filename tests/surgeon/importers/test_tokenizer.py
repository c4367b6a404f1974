"""Tokenizers that come along: added tokens where they were, prompts as the published chat."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerFast, TokenizersBackend

from checkpoints import DEMO
from published import golden_checkpoint
from sentencepiece_models import sentencepiece_model
from surgeon import models
from surgeon.errors import CheckpointError, OptionError
from surgeon.importing import import_checkpoint
from surgeon.inputs import Inputs, Prompt

IMAGE, START, END = "<IMG_CONTEXT>", "<img>", "</img>"
SYSTEM = "You see images."
# InternLM2's way: chat tokens in the places of unused pieces, InternVL's image tokens behind the last piece.
ADDED = {3: "<|im_start|>", 4: "<|im_end|>", 500: IMAGE, 501: START, 502: END}


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


def test_why_transformers_does_not_read_the_added_tokens(tmp_path: Path) -> None:
    """Once this fails, so may we let it."""
    tokenizer = TokenizersBackend.from_pretrained(write_internlm2(tmp_path))
    assert [tokenizer.encode(token, add_special_tokens=False) == [i] for i, token in ADDED.items()] == [False] * 5


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
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == own.tolist()
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


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, False), (True, True), (False, True)])
def test_tokens_at_both_ends(bos: bool, eos: bool, tmp_path: Path) -> None:
    source = write_internlm2(golden_checkpoint(tmp_path / "source"), add_bos_token=bos, add_eos_token=eos)
    import_checkpoint(source, tmp_path / "out")
    text = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model("internlm2")).encode("Hi")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("Hi")["input_ids"] == [1] * bos + text + [2] * eos
    (row,) = Inputs.from_directory(tmp_path / "out").prepare([Prompt("Hi")]).input_ids
    assert row[: 1 + bos].tolist() == [1] * bos + [3]
    assert (row == 1).sum() == bos


def test_no_bos_token_named(tmp_path: Path) -> None:
    source = write_internlm2(golden_checkpoint(tmp_path / "source"), bos_token=None)
    import_checkpoint(source, tmp_path / "out")
    assert 1 not in AutoTokenizer.from_pretrained(tmp_path / "out")("Hi")["input_ids"]


def test_a_bos_token_that_the_tokenizer_lacks(tmp_path: Path) -> None:
    source = write_internlm2(golden_checkpoint(tmp_path / "source"), bos_token="<bos>")
    with pytest.raises(CheckpointError, match="bos_token is '<bos>', which the tokenizer does not have"):
        import_checkpoint(source, tmp_path / "out")
