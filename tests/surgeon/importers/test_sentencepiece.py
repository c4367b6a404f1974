"""Converted sentencepiece models: sentencepiece's ids, and where the loaders of transformers have others."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken
from transformers import LlamaTokenizer, TokenizersBackend
from transformers.convert_slow_tokenizer import LlamaConverter

from sentencepiece_models import KINDS, extended_model, sentencepiece_model
from surgeon.errors import CheckpointError
from surgeon.importers import _sentencepiece


@pytest.mark.parametrize("kind", KINDS)
def test_encodes_and_decodes_as_sentencepiece(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(sentencepiece_model(kind))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(file))
    by_table = bool(
        sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes()).normalizer_spec.precompiled_charsmap
    )
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        converted = _sentencepiece.convert(file, {})
    assert [True for each in warned if "normalises text by a table" in str(each.message)] == [True] * by_table
    control = st.sampled_from("\n\t\r\0\x01\u200d\ufffd" if not by_table else "\n\t\0\x01\ufffd")
    words = st.sampled_from(["the", "def ", "import", "  ", " ", "▁", "aaa", "----", "0x7f", "图片", "é", "🙂"])
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
    for text in ("▁the", " ▁", "▁▁ the▁ ", "a▁ ", "\n a \n"):  # a space's mark is text like any other
        ids = reference.encode(text)
        assert (converted.encode(text, add_special_tokens=False).ids, converted.decode(ids)) == (
            ids,
            reference.decode(ids),
        ), text
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
    for kind, text in (("a word defined", "aaa"), ("spaces defined", "  two leading spaces")):
        file.write_bytes(sentencepiece_model(kind))
        with pytest.raises(CheckpointError, match=f"cannot be converted exactly: '{text}"):
            _sentencepiece.convert(file, {})
    file.write_bytes(b"\xff\xff not a model")
    with pytest.raises(CheckpointError, match="cannot be read as a sentencepiece model"):
        _sentencepiece.convert(file, {})
    file.write_bytes(sentencepiece_model("internlm2"))
    piece = sentencepiece.SentencePieceProcessor(model_file=str(file)).id_to_piece(450)
    with pytest.raises(CheckpointError, match="is added with id 500, and has id 450"):
        _sentencepiece.convert(file, {500: AddedToken(piece)})


# -- what transformers' own loaders get wrong --------------------------------------------------------------------
WOR = "internlm2 and a piece with score 0"


@pytest.mark.parametrize(
    ("kind", "loader", "text"),
    [
        ("llama", TokenizersBackend, "a"),  # no dummy prefix
        ("internlm2", LlamaTokenizer, "a"),  # one that is not wanted
        ("llama", LlamaTokenizer, " a"),  # none where a space comes first
        ("trimmed", TokenizersBackend, "a  b"),  # extra spaces are kept
        ("trimmed", LlamaTokenizer, "a  b"),
        ("sentencepiece's defaults", LlamaTokenizer, "a\tb"),  # nor is text normalised
        ("gemma", TokenizersBackend, " " * 9),  # pieces of spaces are merged, and not matched from the left
        (WOR, TokenizersBackend, "hello world"),  # the last piece is the last to be merged, whatever its score
    ],
)
def test_why_transformers_does_not_load_the_model(
    kind: str, loader: type[TokenizersBackend], text: str, tmp_path: Path
) -> None:
    """Once one of these fails, that part of `convert` may go."""
    file = tmp_path / "tokenizer.model"
    file.write_bytes(extended_model("internlm2", "wor") if kind == WOR else sentencepiece_model(kind))
    expected = sentencepiece.SentencePieceProcessor(model_file=str(file)).encode(text)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*normalises text by a table")
        converted = _sentencepiece.convert(file, {})
    assert converted.encode(text, add_special_tokens=False).ids == expected
    assert loader.from_pretrained(tmp_path).encode(text, add_special_tokens=False) != expected


def test_why_no_converter_of_slow_tokenizers_is_used(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model("llama"))
    slow = SimpleNamespace(vocab_file=str(tmp_path / "tokenizer.model"), convert_ids_to_tokens=str)
    with pytest.raises(AttributeError, match="__name__"):  # of the pieces, which it takes for a class
        LlamaConverter(slow).converted()


def test_merges_go_through_pieces_that_are_not_used(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    proto = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_model("internlm2"))
    pieces, samples = {piece.piece for piece in proto.pieces}, "".join(_sentencepiece.SAMPLES)
    letters = sorted(piece for piece in pieces if len(piece) == 1 and piece.isascii() and piece.isalpha())
    triples = (a + b + c for a in letters for b in letters for c in letters)
    # made of its first two alone, which no sample has side by side: what is not used has no token that is alike
    whole = next(t for t in triples if t[:2] not in samples and not {t[:2], t[1:]} & pieces)
    proto.pieces.add(piece=whole[:2], score=-1000.0, type=sentencepiece_model_pb2.ModelProto.SentencePiece.UNUSED)
    proto.pieces.add(piece=whole, score=-1001.0)
    file.write_bytes(proto.SerializeToString())
    assert sentencepiece.SentencePieceProcessor(model_file=str(file)).encode(whole) == [len(proto.pieces) - 1]
    assert _sentencepiece.convert(file, {}).encode(whole, add_special_tokens=False).ids == [len(proto.pieces) - 1]
