"""From logits to text, the same for every runtime: sampling, stopping, and text that is decoded as it comes."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from surgeon.errors import OptionError, SurgeonError
from surgeon.memory.memory_tokens import Kind, MemoryTokens

FinishReason = Literal["stop", "length"]
"""Why a row ended: an end-of-sequence token, or no room (in the tokens asked for, or in the cache)."""
OnText = Callable[[int, str], None]
"""Called with a row and the text that was added to it."""


@dataclass(frozen=True)
class Invoked:
    """One call for memory in an answer."""

    token: int
    """How many tokens of the answer were before it."""
    kind: Kind
    seconds: float
    """That forming the memory took; feeding it is a few tokens more."""


@dataclass(frozen=True)
class Generation:
    """What one prompt was answered. `token_ids` ends with the end-of-sequence token where the reason is "stop"; memory
    tokens are not among them."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    invocations: list[Invoked] = field(default_factory=list)
    """Where the model called for memory."""


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits. A temperature of 0 is greedy, and the other settings then change nothing."""

    temperature: float = 0.0
    top_k: int | None = None
    """Draw from the k most likely tokens; ties with the last of them are kept."""
    top_p: float | None = None
    """Draw from the smallest set of the most likely tokens whose probabilities sum to at least p."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises OptionError for values out of range."""
        if not 0 <= self.temperature < float("inf"):
            raise OptionError(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise OptionError(f"top_k is {self.top_k}; it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise OptionError(f"top_p is {self.top_p}; it must be in (0, 1]")

    def generators(self, rows: int) -> list[np.random.Generator]:
        """Fresh ones for a request of so many rows."""
        return [np.random.default_rng((self.seed, row) if row else self.seed) for row in range(rows)]


def sample(
    logits: np.ndarray,
    sampling: Sampling,
    generators: Sequence[np.random.Generator],
    free: np.ndarray | None = None,
) -> np.ndarray:
    """One token for each row: logits [B, V] -> int64 [B].

    Every row draws from a generator of its own, so what it gets does not depend on the others. Rows that are not in
    `free`, bool [B], draw nothing and get the likeliest token. Raises SurgeonError where a row's logits are NaN or hold
    no finite maximum.
    """
    usable = np.isfinite(logits.max(axis=-1))
    if not usable.all():
        rows = np.flatnonzero(~usable).tolist()
        raise SurgeonError(
            f"the logits of row(s) {rows} are not finite: its weights hold NaN or infinite values, or in fp16 it "
            "overflows, which bf16 and fp32 do not"
        )
    if sampling.temperature == 0:
        return logits.argmax(axis=-1).astype(np.int64)
    tokens = logits.argmax(axis=-1).astype(np.int64)
    for row in range(len(logits)) if free is None else np.flatnonzero(free).tolist():
        tokens[row] = _draw(logits[row], sampling, generators[row].random())
    return tokens


def _draw(logits: np.ndarray, sampling: Sampling, draw: float) -> int:
    """The token at `draw` (in [0, 1)) of the cumulative distribution, the most likely token first."""
    with np.errstate(over="ignore"):  # of a tiny temperature: what is not the largest is then never drawn
        scores = (logits.astype(np.float64) - np.float64(logits.max())) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < len(scores):
        kth = np.partition(scores, -sampling.top_k)[-sampling.top_k]
        candidates = np.flatnonzero(scores >= kth)
    else:
        candidates = np.arange(len(scores))
    candidates = candidates[np.argsort(-scores[candidates], kind="stable")]
    probabilities = np.exp(scores[candidates] - scores[candidates[0]])
    cumulative = np.cumsum(probabilities)
    if sampling.top_p is not None:
        num_kept = 1 + int(np.searchsorted(cumulative, sampling.top_p * cumulative[-1], side="left"))
        candidates, cumulative = candidates[:num_kept], cumulative[:num_kept]
    index = int(np.searchsorted(cumulative, draw * cumulative[-1], side="right"))
    return int(candidates[min(index, len(candidates) - 1)])


class Rows:
    """The tokens of a batch as it is generated, and which rows have ended, and why."""

    def __init__(self, eos_token_ids: Sequence[Collection[int]], limits: Sequence[int]) -> None:
        """For each row the ids that end it, and how many tokens it may have at most."""
        self.eos_token_ids = [frozenset(ids) for ids in eos_token_ids]
        self.limits = list(limits)
        self.token_ids: list[list[int]] = [[] for _ in self.limits]
        self.finish_reasons: list[FinishReason | None] = ["length" if limit < 1 else None for limit in self.limits]

    @property
    def active(self) -> np.ndarray:
        """Which rows go on: bool [B]."""
        return np.array([reason is None for reason in self.finish_reasons])

    def push(self, tokens: np.ndarray, rows: np.ndarray | None = None) -> None:
        """Append tokens [B] to the rows that are active, or to those of them in `rows`, bool [B]; an end-of-sequence
        token is kept as the row's last."""
        for row in np.flatnonzero(self.active if rows is None else self.active & rows):
            token = int(tokens[row])
            self.token_ids[row].append(token)
            if token in self.eos_token_ids[row]:
                self.finish_reasons[row] = "stop"
            elif len(self.token_ids[row]) >= self.limits[row]:
                self.finish_reasons[row] = "length"


class TextStream:
    """One row's text as its tokens arrive. The emitted pieces add up to the decoded text; a character that spans
    several tokens is emitted with the last of them."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        """`decode`: the text of token ids, e.g. `Inputs.decode`."""
        self._decode = decode
        self._ids: list[int] = []
        self._emitted = 0  # how many ids have had their text emitted
        self._context = (
            0  # where decoding starts: some of those, because a tokenizer may treat a text's start otherwise
        )

    def push(self, token: int) -> str:
        """The text that became certain with this token; empty while a character is incomplete."""
        self._ids.append(token)
        return self._advance(final=False)

    def finish(self) -> str:
        """What is left, when no token follows: an incomplete character as U+FFFD."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        previous_text = self._decode(self._ids[self._context : self._emitted])
        text = self._decode(self._ids[self._context :])
        if (text.endswith(_INCOMPLETE) and not final) or len(text) <= len(previous_text):
            return ""
        self._context, self._emitted = self._emitted, len(self._ids)
        return text[len(previous_text) :]


class Answers:
    """A batch while it is answered: its rows' tokens, and their text as it becomes certain."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        eos_token_ids: Collection[int],
        limits: Sequence[int],
        on_text: OnText | None,
        memory_tokens: MemoryTokens | None = None,
    ) -> None:
        """`decode`: as for `TextStream`; `limits`: how many tokens each row may have, of those that the caller sees:
        memory_tokens are kept apart."""
        self._rows = Rows([eos_token_ids] * len(limits), limits)
        self._streams = [TextStream(decode) for _ in limits]
        self._texts = [""] * len(limits)
        self._on_text = on_text
        self._memory_tokens = memory_tokens
        self._invoked: list[list[tuple[int, Kind]]] = [[] for _ in limits]
        self._seconds: list[list[float]] = [[] for _ in limits]

    @property
    def active(self) -> np.ndarray:
        """Which rows go on: bool [B]."""
        return self._rows.active

    def push(self, tokens: np.ndarray) -> None:
        """Append tokens [B] to the rows that go on."""
        hidden = np.array([self._is_hidden(row, int(token)) for row, token in enumerate(tokens)])
        visible_rows = self.active & ~hidden
        active_rows = np.flatnonzero(visible_rows).tolist()
        self._rows.push(tokens, visible_rows)
        for row in active_rows:
            self._add(row, self._streams[row].push(int(tokens[row])))
            if not self._rows.active[row]:
                self._add(row, self._streams[row].finish())

    def _is_hidden(self, row: int, token: int) -> bool:
        """Whether it is a memory token; an invocation is noted."""
        if self._memory_tokens is None or token not in self._memory_tokens.ids:
            return False
        kind = self._memory_tokens.kind_of(token)
        if kind is not None and self.active[row]:
            self._invoked[row].append((len(self._rows.token_ids[row]), kind))
        return True

    def limit(self, row: int, more: int) -> None:
        """The row may have so many tokens more at most."""
        self._rows.limits[row] = min(self._rows.limits[row], len(self._rows.token_ids[row]) + more)

    def timed(self, row: int, seconds: float) -> None:
        """The row's latest invocation took so long."""
        self._seconds[row].append(seconds)

    def _add(self, row: int, text: str) -> None:
        self._texts[row] += text
        if text and self._on_text is not None:
            self._on_text(row, text)

    def generations(self) -> list[Generation]:
        """Of the rows that have ended, which in the end are all."""
        ended = zip(self._texts, self._rows.token_ids, self._rows.finish_reasons, self._invocations(), strict=True)
        return [Generation(text, ids, reason, invoked) for text, ids, reason, invoked in ended if reason is not None]

    def _invocations(self) -> list[list[Invoked]]:
        return [
            [Invoked(token, kind, seconds[number]) for number, (token, kind) in enumerate(invoked[: len(seconds)])]
            for invoked, seconds in zip(self._invoked, self._seconds, strict=True)
        ]


_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
