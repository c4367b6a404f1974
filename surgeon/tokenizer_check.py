"""Whether an extended tokenizer is the source's with these tokens, and nothing else: transformers itself is asked."""

from collections.abc import Iterable, Mapping
from typing import Any

from surgeon import rendering
from surgeon.errors import CheckpointError, InputError

_TEXTS = (
    "Describe the picture in detail.",
    "  leading and trailing  \n\n\ttabs\r\n   ",
    "Größe, façade, naïve; e\u0301 beside \u00e9; Ελληνικά, русский, 中文字符, 日本語, 한국어, العربية, हिन्दी",
    "emoji 👩‍👩‍👧‍👦 🇩🇪 ✂️, a zero\u200bwidth space, a no\u00a0break one, \ufeff and \U0001d538",
    "def f(x: int) -> dict[str, list[int]]:\n    return {'a': [x << 2, ~x]}  # <|im_end|>\n",
    '<div class="a">&lt;mem&gt; &amp; <b>bold</b></div>\n<!-- <ms -->',
    "1234567890 3.14e-10 0xFF 12,345.67 $ € % ^ & * ( ) _ + - = [ ] { } ; : ' \" \\ | , . < > / ? ` ~",
    "https://example.org/a?b=c&d=%20#e user@example.org C:\\path\\file.txt",
    "don't I'LL we've THEY'RE",
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Hi<|im_end|>\n<img></img><s></s>[INST][/INST]",
    "<ms_ < ms_I> <ms _I> <MS_I> ms_I> <<ms_>> <mem <me m> </mem> <|mem|> <ml_",
)
_NEAR_MISSES_OF = 64
"""Of so many tokens, near misses are tried."""


def check_extended(before: Any, after: Any, tokens: Mapping[str, int]) -> None:
    """Hold a tokenizer after its files were extended by `tokens` against the one before.

    Raises CheckpointError, in words, unless each token is one id alone and inside text, is decoded again and hidden by
    `skip_special_tokens`, and every other text, the chat template's too, is split as before.
    """
    if len(after) != len(before) + len(tokens):
        raise CheckpointError(
            f"it has {len(after):,} tokens then, where {len(before):,} and {len(tokens):,} new ones are to be"
        )
    if before.special_tokens_map != after.special_tokens_map:
        raise CheckpointError("it has other named special tokens then")
    if before.chat_template != after.chat_template:
        raise CheckpointError("it has another chat template then")
    for token, token_id in tokens.items():
        _check_token(after, token, token_id)
    for text in _texts(before, tokens):
        if _ids(before, text) != _ids(after, text):
            raise CheckpointError(f"it splits other text differently then, such as {text[:60]!r}")


def ids_of_text(tokenizer: Any, text: str) -> list[int]:
    """A text's token ids, without tokens that the tokenizer puts around it."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _ids(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    return tokenizer(text)["input_ids"], ids_of_text(tokenizer, text)


def _check_token(tokenizer: Any, token: str, token_id: int) -> None:
    actual = tokenizer.convert_tokens_to_ids(token)
    if actual != token_id:
        raise CheckpointError(f"{token!r} has the id {actual} then, where {token_id} is to be")
    if ids_of_text(tokenizer, token) != [token_id] or ids_of_text(tokenizer, token * 2) != [token_id] * 2:
        raise CheckpointError(f"{token!r} is not one token then")
    inside = ids_of_text(tokenizer, f"Look:{token}done. {token}\n{token}")
    if inside.count(token_id) != 3:
        raise CheckpointError(f"{token!r} is not one token inside text then")
    if tokenizer.decode([token_id]).strip() != token:
        raise CheckpointError(
            f"the id of {token!r} is decoded as {tokenizer.decode([token_id])!r} then; name the token in ASCII"
        )
    if tokenizer.decode([token_id], skip_special_tokens=True).strip():
        raise CheckpointError(f"{token!r} is not hidden by skip_special_tokens then")


def _texts(tokenizer: Any, tokens: Mapping[str, int]) -> Iterable[str]:
    """Varied texts that hold none of the tokens."""
    texts = [*_TEXTS, *_chat_texts(tokenizer)]
    for token in [*tokens][:_NEAR_MISSES_OF]:
        inner = len(token) // 2
        texts += [token[:-1], token[1:], f"{token[:inner]} {token[inner:]}", token.swapcase(), token[::-1]]
    return [text for text in texts if text and not any(token in text for token in tokens)]


def _chat_texts(tokenizer: Any) -> list[str]:
    """What the chat template makes of a conversation; nothing where there is none, or it needs more than that."""
    template = tokenizer.chat_template
    if not isinstance(template, str):
        return []
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A chart."}]},
        {"role": "user", "content": [{"type": "text", "text": "Are you sure?"}]},
    ]
    try:
        return [rendering.render(template, messages, {**tokenizer.special_tokens_map, "add_generation_prompt": True})]
    except InputError:
        return []
