"""Whether two forms of a model that calls for memory form the same: forced to call at chosen steps, and left free."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from surgeon.generation import Generation
from surgeon.inputs import Prompt
from surgeon.memory.memory_tokens import LONG, SHORT, Kind
from surgeon.memory_use import Mode
from surgeon.parity.cases import Case
from surgeon.parity.levels import Level
from surgeon.parity.metrics import compare_logits
from surgeon.parity.report import Check
from surgeon.progress import Progress

Schedule = Sequence[Mapping[int, Kind]]
"""For each row the kind of memory that it has to call for, by the number of tokens of its answer that are before it."""

STEPS = 8
_ROWS = 4


@dataclass(frozen=True)
class CalledTrace:
    """One batch of prompts, and tokens decoded after each with memory called for at the steps of a schedule."""

    step_logits: np.ndarray
    """fp32 [B, steps, V]: the logits from which token i of the answer was taken."""
    tokens: np.ndarray
    """int64 [B, steps]."""


class InvokingRunner(Protocol):
    """A runner whose model may call for memory."""

    path: str
    record: Mapping[str, Any] | None

    def called_trace(
        self, prompts: Sequence[Prompt], steps: int, schedule: Schedule, tokens: np.ndarray | None = None
    ) -> CalledTrace:
        """Decode with memory called for as the schedule says, and at no other step. `tokens` [B, steps], if not None,
        are fed instead of the greedy ones."""

    def answers(self, prompts: Sequence[Prompt], steps: int, mode: Mode) -> list[Generation]:
        """Greedy answers of `steps` tokens, in which the model calls for memory itself."""


def schedule_of(prompts: Sequence[Prompt], record: Mapping[str, Any], steps: int) -> Schedule:
    """Rows that call at different steps and in different orders for each kind of memory that they can form: at once
    and later, twice in a row's answer; the last of several rows never."""
    schedule: list[dict[int, Kind]] = []
    for row, prompt in enumerate(prompts):
        looks = bool(prompt.images) or record["short_former"] == "language"
        kinds: tuple[Kind, Kind] = (SHORT, LONG) if looks else (LONG, LONG)
        first, second = kinds if row % 2 == 0 else kinds[::-1]
        never = len(prompts) > 1 and row == len(prompts) - 1
        schedule.append({} if never else {row % steps: first, (row + steps // 2) % steps: second})
    return schedule


def compare_invocations(
    reference: InvokingRunner,
    candidate: InvokingRunner,
    cases: Sequence[Case],
    level: Level,
    progress: Progress | None = None,
    steps: int = STEPS,
) -> list[Check]:
    """Both forms over a case with images: with invocations forced, by their logits at the level between them; and with
    memory wanted always, by the tokens and the calls of their answers, which rounding may change where they are not
    fp32."""
    record = (reference.record or {})["vismem"]
    with_images = [case for case in cases if any(prompt.images for prompt in case.prompts)]
    case = max(with_images or cases, key=lambda each: len(each.prompts))
    prompts = case.prompts[:_ROWS]
    if progress is not None:
        progress("comparing invocations", 0, 2)
    schedule = schedule_of(prompts, record, steps)
    expected = reference.called_trace(prompts, steps, schedule)
    actual = candidate.called_trace(prompts, steps, schedule, expected.tokens)
    difference = compare_logits(_flat(expected.step_logits), _flat(actual.step_logits))
    calls = sum(map(len, schedule))
    said = f"{calls} invocations in {len(prompts)} row(s) of {case.name!r}: max abs {difference.max_abs:.3g}"
    checks = [Check("forced", said, level.failures(difference))]
    if progress is not None:
        progress("comparing invocations", 1, 2)
    pair = [runner.answers(prompts, steps, "always") for runner in (reference, candidate)]
    same = [_essence(a) == _essence(b) for a, b in zip(*pair, strict=True)]
    calls = sum(len(answer.invocations) for answer in pair[0])
    said = f"{calls} invocations that the model chose: {sum(same)} of {len(prompts)} row(s) answer and call alike"
    exact = level.bit_equal or level.name == "fp32"
    failures = [] if all(same) or not exact else [f"row {same.index(False)} answers or calls otherwise"]
    checks.append(Check("free", said, failures))
    if progress is not None:
        progress("comparing invocations", 2, 2)
    return checks


def _flat(step_logits: np.ndarray) -> np.ndarray:
    return step_logits.reshape(-1, step_logits.shape[-1])


def _essence(answer: Generation) -> Any:
    return answer.token_ids, [(each.token, each.kind) for each in answer.invocations]
