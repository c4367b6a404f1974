"""Small sentencepiece models, trained on this project's tests."""

import io
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from surgeon.importers._sentencepiece import SAMPLES

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
# Gemma's way: runs of spaces are pieces that no merge makes
GEMMA = {**INTERNLM2, "user_defined_symbols": ["\n\n", *("▁" * n for n in range(2, 9))]}
TRIMMED = {"normalization_rule_name": "identity"}
KINDS: dict[str, dict[str, Any]] = {
    "internlm2": INTERNLM2,
    "llama": LLAMA,
    "gemma": GEMMA,
    "trimmed": TRIMMED,
    "trimmed, no prefix": {**TRIMMED, "add_dummy_prefix": False},
    "sentencepiece's defaults": {},
}
INEXACT: dict[str, dict[str, Any]] = {
    # a word that no merge may touch, behind which sentencepiece puts no further dummy prefix
    "a word defined": {**LLAMA, "user_defined_symbols": ["----"]},
    "spaces defined": {**LLAMA, "user_defined_symbols": ["▁▁▁"]},
}
"""Kinds that the tokenizers library cannot follow."""


@cache
def sentencepiece_model(kind: str, model_type: str = "bpe") -> bytes:
    """A tokenizer.model of 500 pieces, 256 of them bytes."""
    sources = sorted((Path(__file__).parent / "surgeon" / "importers").glob("*.py"))
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    lines = [*text.splitlines(), *SAMPLES, *(" " * n + "x" for n in range(9)), "aaaaaaaa ------"] * 3
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=500,
        model_type=model_type,
        byte_fallback=True,
        character_coverage=0.98,
        minloglevel=2,
        **{**KINDS, **INEXACT}[kind],
    )
    return model.getvalue()


def extended_model(kind: str, piece: str) -> bytes:
    """A model with one more piece behind its last, of score 0, as vocabularies are extended to another language."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_model(kind))
    assert all(known.piece != piece for known in proto.pieces)
    proto.pieces.add(piece=piece, score=0.0)
    return proto.SerializeToString()
