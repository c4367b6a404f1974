"""Compare two subjects over cases, and say where they part."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from surgeon import __version__
from surgeon.errors import TooLongError
from surgeon.parity.cases import Case
from surgeon.parity.ladder import Rung
from surgeon.parity.metrics import LogitDifference, compare, compare_logits
from surgeon.parity.subject import Subject, Trace

Progress = Callable[[str, int, int], None]


@dataclass
class CaseResult:
    """One case's verdict. Logits are compared over each prompt and over each decoding step."""

    name: str
    rows: int
    pictures: int
    prompt_tokens: int
    steps: int
    prefill: LogitDifference
    decode: LogitDifference
    tokens_equal: int
    """How many of the reference's rows * steps greedy tokens the subject chose, fed the tokens before them."""
    failures: list[str] = field(default_factory=list)
    first_wrong: str | None = None
    """The first tensor on the way through the prefill that is wrong, where the case failed and one could be found."""


@dataclass
class Report:
    """The verdict on a pair."""

    reference: str
    subject: str
    stages: tuple[str, str]
    dtypes: tuple[str, str]
    rung: Rung
    cases: list[CaseResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    version: str = __version__

    @property
    def passed(self) -> bool:
        return bool(self.cases) and not any(case.failures for case in self.cases)

    def to_json(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}


def validate(
    reference: Subject,
    subject: Subject,
    cases: Sequence[Case],
    rung: Rung,
    steps: int = 32,
    progress: Progress | None = None,
) -> Report:
    """Run every case through both and judge it by `rung`. `steps` tokens are decoded after each prompt.

    Cases that are longer than what one of the two was made for are left out with a note, as long as one is left. Raises
    TooLongError where none is.
    """
    started = time.monotonic()
    report = Report(
        reference.path, subject.path, (reference.stage, subject.stage), (reference.dtype, subject.dtype), rung
    )
    for number, case in enumerate(cases):
        if progress is not None:
            progress(case.name, number, len(cases))
        try:
            report.cases.append(_run(reference, subject, case, rung, steps))
        except TooLongError as error:
            report.notes.append(f"left out {case.name!r}: {error}")
            if len(report.notes) == len(cases):
                raise
    report.seconds = time.monotonic() - started
    return report


def _run(reference: Subject, subject: Subject, case: Case, rung: Rung, steps: int) -> CaseResult:
    expected = reference.trace(case.prompts, steps)
    found = subject.trace(case.prompts, steps, expected.tokens)
    mismatch = _same_inputs(expected, found)
    prefill = compare_logits(np.concatenate(expected.prompt_logits), np.concatenate(found.prompt_logits))
    vocab = expected.step_logits.shape[-1]
    decode = compare_logits(expected.step_logits.reshape(-1, vocab), found.step_logits.reshape(-1, vocab))
    result = CaseResult(
        name=case.name,
        rows=len(case.prompts),
        pictures=sum(len(prompt.images) for prompt in case.prompts),
        prompt_tokens=sum(len(ids) for ids in expected.prompt_ids),
        steps=steps,
        prefill=prefill,
        decode=decode,
        tokens_equal=int((found.step_logits.argmax(-1) == expected.tokens).sum()),
    )
    result.failures = mismatch or [
        f"{part}: {failure}"
        for part, difference in (("prefill", prefill), ("decode", decode))
        for failure in rung.failures(difference)
    ]
    if result.failures and not mismatch:
        result.first_wrong = first_wrong(reference, subject, case, rung)
    return result


def _same_inputs(expected: Trace, found: Trace) -> list[str]:
    """The two must be asked the same: other tokens mean another tokenizer, template or picture size."""
    for row, (a, b) in enumerate(zip(expected.prompt_ids, found.prompt_ids, strict=True)):
        if not np.array_equal(a, b):
            return [f"row {row}: the prompt becomes {len(a)} tokens in one and {len(b)} in the other, or other ones"]
    return []


def first_wrong(reference: Subject, subject: Subject, case: Case, rung: Rung) -> str | None:
    """The first tensor of the prefill in which the two differ by more than the rung's `layer_relative`."""
    expected, found = reference.tensors(case.prompts), subject.tensors(case.prompts)
    if expected is None or found is None:  # an engine shows nothing of what it computes
        return None
    for name, rows in expected.items():
        if name not in found:
            return f"{name}: missing"
        for row, (a, b) in enumerate(zip(rows, found[name], strict=True)):
            difference = compare(a, b)
            if difference.non_finite:
                return f"{name}, row {row}: {difference.non_finite} NaN or infinite values"
            if difference.max_relative > rung.layer_relative:
                at = np.unravel_index(int(np.abs(a - b).argmax()), a.shape)
                return f"{name}, row {row}: off by {difference.max_abs:.3g} of {np.abs(a).max():.3g}, at token {at[0]}"
    return None
