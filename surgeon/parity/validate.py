"""Compare two runners over cases, and say where they part."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from surgeon.errors import TooLongError
from surgeon.parity.added_tokens import AddedTokens
from surgeon.parity.cases import Case
from surgeon.parity.levels import Level
from surgeon.parity.metrics import LogitDifference, compare, compare_logits, not_compared
from surgeon.parity.runner import Runner, Trace
from surgeon.progress import Progress

Verdict = Literal["passed", "failed", "not judged"]
AS_THEY_ARE = "as they are"


@dataclass
class CaseResult:
    """One case's verdict. Logits are compared over each prompt and over each decoding step."""

    name: str
    rows: int
    images: int
    prompt_tokens: int
    steps: int
    prefill: LogitDifference
    decode: LogitDifference
    tokens_equal: int
    """How many of the reference's rows * steps greedy tokens the candidate chose, fed the tokens before them."""
    failures: list[str] = field(default_factory=list)
    first_wrong: str | None = None
    """The first tensor of the prefill that is wrong, where the case failed and tensors could be compared."""


@dataclass
class Comparison:
    """All cases through both runners, and what came of it."""

    level: Level
    state: str = AS_THEY_ARE
    """What was changed in both, in memory, before they were compared."""
    cases: list[CaseResult] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """Of all cases together."""
    notes: list[str] = field(default_factory=list)
    after_images: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list, repr=False)
    """Of each case's rows with images, the logits from which the first token was taken, fp32 [B, V]: the reference's
    and the candidate's."""

    @property
    def verdict(self) -> Verdict:
        if self.failures or any(case.failures for case in self.cases):
            return "failed"
        return "passed" if self.level.judged and self.cases else "not judged"

    @property
    def passed(self) -> bool:
        return self.verdict == "passed"

    def to_json(self) -> dict[str, Any]:
        names = ("level", "state", "cases", "failures", "notes")
        fields = {name: getattr(self, name) for name in names}
        fields |= {"level": asdict(self.level), "cases": [asdict(case) for case in self.cases]}
        return {"verdict": self.verdict, **fields}


def validate(
    reference: Runner,
    candidate: Runner,
    cases: Sequence[Case],
    level: Level,
    steps: int = 32,
    progress: Progress | None = None,
    state: str = AS_THEY_ARE,
    added: AddedTokens | None = None,
) -> Comparison:
    """Run every case through both and judge it by `level`. `steps` tokens are decoded after each prompt.
    `added`: tokens that the candidate alone has; compared are the logits of the others, and that no added one is
    chosen.

    Cases that are longer than what one of the two was made for are left out with a note, as long as one is left. Raises
    TooLongError where none is.
    """
    comparison = Comparison(level, state)
    for number, case in enumerate(cases):
        if progress is not None:
            progress(f"comparing, {state}", number, len(cases))
        try:
            _run(comparison, reference, candidate, case, steps, added)
        except TooLongError as error:
            comparison.notes.append(f"left out {case.name!r}: {error}")
            if not comparison.cases and number + 1 == len(cases):
                raise
    if progress is not None:
        progress(f"comparing, {state}", len(cases), len(cases))
    return comparison


def _run(
    comparison: Comparison,
    reference: Runner,
    candidate: Runner,
    case: Case,
    steps: int,
    added: AddedTokens | None,
) -> None:
    level = comparison.level
    expected = reference.trace(case.prompts, steps)
    actual = candidate.trace(case.prompts, steps, expected.tokens)
    mismatch = _other_questions(expected, actual)
    leading: list[str] = []
    if added is not None:
        judged = added.judged_steps(expected)
        if judged < steps:
            comparison.notes.append(
                f"{case.name}: {judged} of {steps} steps were compared, up to an id in the reference's answer that no "
                "token of its own has"
            )
        expected, actual = (trace.first_steps(judged) for trace in (expected, actual))
    chosen = actual.step_logits.argmax(-1)
    if added is not None:
        if count := added.leading(actual):
            leading.append(f"decode: one of the added tokens is the likeliest at {count} of {chosen.size} steps")
        vocab_size = expected.step_logits.shape[-1]
        expected, actual = (added.left_out(trace, vocab_size) for trace in (expected, actual))
        if added.may_lead or not level.judged:
            comparison.notes += [f"{case.name}: {text}" for text in leading]
            leading = []
    mismatch = mismatch or _other_shapes(expected, actual)
    prefill = decode = not_compared()
    if not mismatch:
        vocab = expected.step_logits.shape[-1]
        prefill = compare_logits(np.concatenate(expected.prompt_logits), np.concatenate(actual.prompt_logits))
        decode = compare_logits(expected.step_logits.reshape(-1, vocab), actual.step_logits.reshape(-1, vocab))
        images = [row for row, prompt in enumerate(case.prompts) if prompt.images]
        comparison.after_images.append((expected.step_logits[images, 0], actual.step_logits[images, 0]))
    result = CaseResult(
        name=case.name,
        rows=len(case.prompts),
        images=sum(len(prompt.images) for prompt in case.prompts),
        prompt_tokens=sum(len(ids) for ids in expected.prompt_ids),
        steps=steps,
        prefill=prefill,
        decode=decode,
        tokens_equal=0 if mismatch else int((chosen == expected.tokens).sum()),
    )
    result.failures = mismatch or [
        f"{part}: {failure}"
        for part, difference in (("prefill", prefill), ("decode", decode))
        for failure in level.failures(difference)
    ]
    result.failures = [*result.failures, *leading]
    if result.failures and not (mismatch or leading):
        result.first_wrong = first_wrong(reference, candidate, case, level)
    comparison.cases.append(result)


def _other_questions(expected: Trace, actual: Trace) -> list[str]:
    """The two must be asked the same: other tokens mean another tokenizer, template or image size."""
    if len(expected.prompt_ids) != len(actual.prompt_ids):
        return [f"{len(expected.prompt_ids)} rows in one and {len(actual.prompt_ids)} in the other"]
    for row, (a, b) in enumerate(zip(expected.prompt_ids, actual.prompt_ids, strict=True)):
        if not np.array_equal(a, b):
            return [f"row {row}: the prompt becomes {len(a)} tokens in one and {len(b)} in the other, or other ones"]
    return []


def _other_shapes(expected: Trace, actual: Trace) -> list[str]:
    """Logits that cannot be set against each other: of another vocabulary, or of fewer positions or steps."""
    shapes = [[list(part.shape) for part in (*trace.prompt_logits, trace.step_logits)] for trace in (expected, actual)]
    return [f"logits of other shapes: {a} and {b}" for a, b in zip(*shapes, strict=False) if a != b][:1]


def first_wrong(reference: Runner, candidate: Runner, case: Case, level: Level) -> str | None:
    """The first tensor of the prefill in which the two differ by more than the level's `layer_relative`."""
    expected, actual = reference.tensors(case.prompts), candidate.tensors(case.prompts)
    if expected is None or actual is None:  # an engine shows nothing of what it computes
        return None
    for name, rows in expected.items():
        if name not in actual:
            return f"{name}: missing"
        for row, (a, b) in enumerate(zip(rows, actual[name], strict=True)):
            if a.shape != b.shape:
                return f"{name}, row {row}: {list(b.shape)} instead of {list(a.shape)}"
            difference = compare(a, b)
            if difference.non_finite:
                return f"{name}, row {row}: {difference.non_finite} NaN or infinite values"
            if difference.max_relative > level.layer_relative:
                at = np.unravel_index(int(np.abs(a - b).argmax()), a.shape)
                return f"{name}, row {row}: off by {difference.max_abs:.3g} of {np.abs(a).max():.3g}, at token {at[0]}"
    return None
