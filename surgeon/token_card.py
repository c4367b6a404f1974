"""What a model card says of the tokens that were added."""

from collections.abc import Iterable, Mapping
from typing import Any

from surgeon.markdown import code, table

MEMORY_TOKENS = "memory-tokens"
"""The pass that adds them."""
_SHOWN = 32


def effect_of_tokens(options: Iterable[Mapping[str, Any]]) -> str:
    """How answers relate to the source's. `options`: of each pass that added tokens."""
    text = (
        "**The new tokens are not trained.** Their rows are new; those of the source's tokens, and with them these "
        "tokens' logits, are the source's. "
    )
    if all(each["init"] == "mean" for each in options):
        return text + (
            "A new row is the mean of the source's, with a little noise, so its logit is the mean of all logits and "
            "never the largest: until they are trained, greedy answers are the source's."
        )
    return text + "Where the token that a new row is a copy of is likely, the new one is too, and answers may hold it."


def tokens_section(tokens: Mapping[str, int], record: Mapping[str, Any]) -> list[str]:
    """Which were added, and how they are used; empty where none were. `record`: of the patched checkpoint."""
    if not tokens:
        return []
    shown = [*tokens.items()][:_SHOWN]
    rows = [
        (code(token), str(number), "grown" if number >= record["source_vocab_size"] else "spare")
        for token, number in shown
    ]
    more = f"And {len(tokens) - _SHOWN} more. All of them are in `config.json`, under `surgeon`."
    return [
        "## Tokens",
        "They are special tokens of the tokenizer: each is one id wherever it stands in a text, and "
        "`skip_special_tokens` hides it. A token's row in the embeddings and the head is its id: a spare one, which no "
        "token had, or one by which the tables grew.",
        table(("token", "id", "row"), rows),
        *([more] if len(tokens) > _SHOWN else []),
        f"{_use_of_tokens(shown[0][0], record)} Do not call `resize_token_embeddings(len(tokenizer))`: it would cut "
        "off rows that the source has.",
    ]


def _use_of_tokens(first: str, record: Mapping[str, Any]) -> str:
    if record.get("vismem"):
        return "The model alone uses them, to call for memory: they are kept out of prompts and of answers."
    return f"In a prompt they are written as they are; `tokenizer.convert_tokens_to_ids({first!r})` gives an id."
