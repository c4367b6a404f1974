"""Which token comes next within an invocation, against an automaton that reads a row from its beginning."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgeon.memory.memory_tokens import KINDS, LONG, SHORT, Kind, MemoryTokens

TOKENS = MemoryTokens(
    invoke={"short": 10, "long": 12}, end={"short": 11, "long": 13}, placeholder=14, latents={"short": 2, "long": 4}
)
WORD = 5
ALPHABET = (WORD, 10, 11, 12, 13, 14, 14, 14)


def next_by_automaton(tokens: MemoryTokens, row: list[int]) -> int:
    kind: Kind | None = None
    placeholders = 0
    for token in row:
        invoked = next((each for each in KINDS if tokens.invoke[each] == token), None)
        if invoked is not None:
            kind, placeholders = invoked, 0
        elif token == tokens.placeholder and kind is not None:
            placeholders += 1
        else:
            kind = None
    if kind is None or placeholders > tokens.latents[kind]:
        return -1
    return tokens.placeholder if placeholders < tokens.latents[kind] else tokens.end[kind]


@given(
    st.integers(1, 12).flatmap(
        lambda n: st.lists(st.lists(st.sampled_from(ALPHABET), min_size=n, max_size=n), min_size=1, max_size=6)
    )
)
def test_what_is_forced_is_what_an_automaton_says(rows: list[list[int]]) -> None:
    assert TOKENS.forced(torch.tensor(rows)).tolist() == [next_by_automaton(TOKENS, row) for row in rows]


@given(st.lists(st.sampled_from(["word", "short", "long"]), min_size=1, max_size=8), st.integers(0, 3))
def test_every_token_of_a_whole_invocation_is_forced(parts: list[str], prompt: int) -> None:
    """Well-formed answers, token by token, behind prompts of any length."""
    row, free = [WORD] * (prompt + 1), []
    for part in parts:
        if part == "word":
            row, free = [*row, WORD], [*free, True]
        else:
            kind: Kind = SHORT if part == "short" else LONG
            count = TOKENS.latents[kind]
            row = [*row, TOKENS.invoke[kind], *[TOKENS.placeholder] * count, TOKENS.end[kind]]
            free = [*free, True, *[False] * (count + 1)]
    for place, is_free in enumerate(free, prompt + 1):
        assert TOKENS.forced(torch.tensor([row[:place]])).item() == (-1 if is_free else row[place])


def test_which_tokens_they_are() -> None:
    record = {
        "token_ids": {"short": [10, 11], "long": [12, 13], "placeholder": 14},
        "short": 2,
        "long": 4,
        "separators": [3, 7],
    }
    tokens = MemoryTokens.of(record)
    assert tokens == MemoryTokens(TOKENS.invoke, TOKENS.end, 14, TOKENS.latents, (3, 7))
    assert sorted(tokens.ids) == [10, 11, 12, 13, 14] and tokens.longest == 6
    assert [tokens.kind_of(token) for token in (10, 11, 12, 13, 14, 5)] == ["short", None, "long", None, None, None]
    ids = torch.tensor([[10, 14, 14, 11, 5], [5, 12, 14, 10, 12]])
    assert tokens.is_one(ids).tolist() == [[True] * 4 + [False], [False] + [True] * 4]
    assert tokens.invocations(ids).tolist() == [1, 3]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_everything_is_where_the_ids_are(device: str) -> None:
    ids = torch.zeros((2, 3), dtype=torch.int64, device=device)
    assert TOKENS.forced(ids).device.type == TOKENS.is_one(ids).device.type == device
