"""A sentencepiece BPE model as a `tokenizers` tokenizer that encodes alike.

transformers puts the tokenizer together (`build_tokenizer_from_spm_proto`). Done here is only what its own loaders get
wrong, in transformers 5.15 as in 5.23:

- Merges are ordered by the pieces' scores, as sentencepiece merges. `from_pretrained` orders them by id: pieces that
  extend a vocabulary, whose score of 0 is the best, then come last.
- Where the model says so, a dummy prefix is added (and taken away again in decoding) and extra spaces are removed.
  `TokenizersBackend.from_pretrained` does neither; `LlamaTokenizer` always adds the prefix, except to a text that
  begins with a space, and never removes spaces.
- Pieces with spaces that a user defined are matched after spaces are replaced. `from_pretrained` lets merges make them.

The converters of slow tokenizers (`LlamaConverter`) convert no BPE model at all: they raise AttributeError.
tests/surgeon/importers/test_sentencepiece.py has a text for each of these.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from transformers.convert_slow_tokenizer import SpmConverter, generate_merges

from surgeon.errors import CheckpointError

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
# In ModelProto.SentencePiece.Type; the generated module has no names that a type checker sees.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_BPE = 2

SAMPLES = (
    "Hello, world! What's in this image?",
    "  two leading spaces, a   run of them, and trailing  ",
    "def f(x):\n    return x ** 2  # tabs:\t\tand lines\r\n\n\n",
    "3.14159 1,000,000 2024-06-30 0x7fff",
    "描述这张图片。书生·万象，你好！",  # noqa: RUF001
    "Übergröße naïve Ελληνικά русский العربية हिन्दी 日本語テキスト 한국어",
    "emoji \N{GRINNING FACE}\N{FAMILY} \U0001f468\u200d\U0001f469\u200d\U0001f467 and rare \U00010348\ufffd\u0001",
    "aaaaaaaaa bbbbbbb ------------- ======= ........ !!!!!",
    'https://example.org/a?b=c&d=%20#e <b>bold</b> [x](y) {"k": [1, null]} \\frac{a}{b}',
)
"""What a converted tokenizer is compared on. The whole range of a tokenizer: words, runs, scripts, bytes."""


def convert(file: Path, added: Mapping[int, AddedToken]) -> Tokenizer:
    """The tokenizer of a `tokenizer.model` and the tokens added to it (id -> token), without a post-processor.

    Added tokens keep their ids; one whose id the model already has takes that piece's place, as in InternLM2, whose
    chat tokens stand where the model has unused ones. Raises CheckpointError where the file is damaged, is no BPE
    model, or where its encodings cannot be had exactly (checked on `SAMPLES`). A table by which text is normalised,
    such as sentencepiece's NFKC, is followed but for characters that a joiner or a combining mark stands behind: the
    tokenizers library looks those up together. That is warned of.
    """
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except (DecodeError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as a sentencepiece model: {error}") from error
    trainer, normaliser = proto.trainer_spec, proto.normalizer_spec
    if not proto.pieces or trainer.model_type != _BPE:
        raise CheckpointError(f"{file} is no sentencepiece BPE model, the only kind that can be converted")
    if trainer.treat_whitespace_as_suffix or not normaliser.escape_whitespaces:
        raise CheckpointError(f"{file} marks spaces in a way that cannot be converted (as suffixes, or not at all)")

    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    for i in added:
        if i < len(proto.pieces):
            vocab.pop(proto.pieces[i].piece, None)
    for i, token in added.items():
        if vocab.setdefault(token.content, i) != i:
            raise CheckpointError(f"token {token.content!r} is added with id {i}, and has id {vocab[token.content]}")
    scores = {p.piece: p.score for p in proto.pieces if p.type in (_NORMAL, _UNUSED) and p.piece in vocab}
    merges = generate_merges(vocab, vocab_scores=scores)
    tokenizer: Tokenizer = SpmConverter.build_tokenizer_from_spm_proto(proto, vocab, merges)
    if normaliser.add_dummy_prefix or normaliser.remove_extra_whitespaces:
        tokenizer.normalizer = _normalizer(normaliser)
        prefix = Regex(r"\A +" if normaliser.remove_extra_whitespaces else r"\A ")
        tokenizer.decoder = decoders.Sequence([tokenizer.decoder, decoders.Fuse(), decoders.Replace(prefix, "")])
    own = {
        i: AddedToken(piece.piece, normalized=SPACE in piece.piece, special=piece.type == _CONTROL)
        for i, piece in enumerate(proto.pieces)
        if piece.type in (_CONTROL, _USER_DEFINED)
    }
    tokenizer.add_tokens([token for _, token in sorted({**own, **added}.items())])
    if normaliser.precompiled_charsmap:
        warnings.warn(
            f"{file} normalises text by a table: characters with joiners or combining marks behind them may encode "
            "otherwise than by sentencepiece",
            stacklevel=2,
        )
    _check(file, tokenizer)
    return tokenizer


def _normalizer(spec: sentencepiece_model_pb2.NormalizerSpec) -> normalizers.Normalizer:
    """A model's normaliser. transformers' has only the table, and marks spaces."""
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        # not Strip, for which other characters are spaces too
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    if spec.remove_extra_whitespaces:
        # sentencepiece removes what ends a text only now, and with it the mark itself where a text ends with one
        steps.append(normalizers.Replace(Regex(rf"{SPACE}+\z"), ""))
    return normalizers.Sequence(steps)


def _check(file: Path, tokenizer: Tokenizer) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(file))
    for text in SAMPLES:
        ids, expected = _ids(file, tokenizer, text), reference.encode(text)
        if ids != expected:
            raise CheckpointError(
                f"{file} cannot be converted exactly: {text!r} encodes as {ids[:8]}..., by sentencepiece as "
                f"{expected[:8]}..."
            )


def _ids(file: Path, tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # the library's own, which is no Exception
            raise
        raise CheckpointError(f"{file} cannot be converted: tokenizers panics at {text!r}: {error}") from error
    return ids
