"""The validator on runners whose faults are known."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from surgeon.inputs import Prompt
from surgeon.parity import levels
from surgeon.parity.cases import Case
from surgeon.parity.metrics import Effect, LogitDifference, compare_logits
from surgeon.parity.report import Check, Report
from surgeon.parity.runner import Trace
from surgeon.parity.validate import validate

VOCAB, LAYERS = 11, 3
CASES = [Case("one", (Prompt("a"),)), Case("two rows", (Prompt("b"), Prompt("ccc")))]
Fault = Callable[[np.ndarray], np.ndarray]


class Toy:
    """A deterministic model of numpy; `fault` is applied to its logits, `layer_faults` to its layers."""

    path, stage, dtype, record = "toy", "checkpoint", "fp32", None

    def __init__(
        self, fault: Fault | None = None, layer_faults: dict[int, Fault] | None = None, shift: int = 0
    ) -> None:
        self.fault = fault or (lambda x: x)
        self.layer_faults = layer_faults or {}
        self.shift = shift

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        rows = [np.random.default_rng(int(i)).standard_normal(VOCAB) for i in ids]
        return self.fault(np.stack(rows).astype(np.float32))

    def ids(self, prompt: Prompt) -> np.ndarray:
        return np.array([len(prompt.text) + i + self.shift for i in range(3)])

    def trace(self, prompts: Sequence[Prompt], steps: int, tokens: np.ndarray | None = None) -> Trace:
        ids = [self.ids(prompt) for prompt in prompts]
        logits, fed = [], []
        for row, prompt_ids in enumerate(ids):
            last, row_logits, row_tokens = prompt_ids[-1], [], []
            for step in range(steps):
                row_logits.append(self.logits([last])[0])
                last = row_logits[-1].argmax() if tokens is None else tokens[row, step]
                row_tokens.append(int(last))
            logits.append(row_logits)
            fed.append(row_tokens)
        return Trace(ids, [self.logits(row) for row in ids], np.array(logits), np.array(fed))

    def tensors(self, prompts: Sequence[Prompt]) -> dict[str, list[np.ndarray]]:
        hidden_states = {}
        for layer in range(LAYERS):
            values = [np.outer(self.ids(p) + 1.0, np.arange(1, 5)) * (layer + 1) for p in prompts]
            hidden_states[f"hidden_states.{layer}"] = [self.layer_faults.get(layer, lambda x: x)(v) for v in values]
        return hidden_states


def test_the_same_model_passes_every_rung() -> None:
    for level in (levels.IDENTITY, levels.FP32, levels.FP16, levels.BF16):
        comparison = validate(Toy(), Toy(), CASES, level, steps=5)
        assert comparison.passed and [case.tokens_equal for case in comparison.cases] == [5, 10]


@pytest.mark.parametrize("level", [levels.TUNED, levels.MOVED])
def test_a_rung_that_judges_nothing_does_not_pass(level: levels.Level) -> None:
    for candidate in (Toy(), Toy(lambda x: -x)):
        comparison = validate(Toy(), candidate, CASES, level, steps=2)
        assert comparison.verdict == "not judged" and not comparison.passed
        report = Report("b", ("checkpoint",) * 2, ("fp32",) * 2, "a", [Check("weights", "equal")], [comparison])
        assert report.verdict == "not judged" and not report.passed
        assert report.to_json()["passed"] is False and report.to_json()["remedy"]


@pytest.mark.parametrize(
    ("fault", "level", "message"),
    [
        (lambda x: x * np.float32(1 + 1e-6), levels.IDENTITY, "bit-equality"),
        (lambda x: x + np.float32(1e-3), levels.FP32, "max abs"),
        (lambda x: -x, levels.FP16, "cosine"),
        (lambda x: x * np.float32(1.5), levels.BF16, "mean KL"),
        (lambda x: np.roll(x, 1, -1), levels.FP16, "nats"),
        (lambda x: np.where(x == x.max(), np.float32(np.nan), x), levels.TUNED, "NaN or infinite"),
        (lambda x: x * np.float32(np.inf), levels.BF16, "NaN or infinite"),
    ],
)
def test_a_fault_fails_its_rung(fault: Fault, level: levels.Level, message: str) -> None:
    report = validate(Toy(), Toy(fault), CASES, level, steps=5)
    assert not report.passed
    assert any(message in failure for case in report.cases for failure in case.failures)
    assert report.to_json()["verdict"] == report.verdict == "failed"


def only_decoding(candidate: Toy, fault: Fault) -> Toy:
    """A toy whose prompts are right, and whose steps after them are not."""
    right = candidate.trace

    def trace(prompts: Sequence[Prompt], steps: int, tokens: np.ndarray | None = None) -> Trace:
        traced = right(prompts, steps, tokens)
        return replace(traced, step_logits=fault(traced.step_logits))

    candidate.trace = trace  # type: ignore[method-assign]
    return candidate


@pytest.mark.parametrize("level", [levels.IDENTITY, levels.FP32, levels.FP16, levels.BF16])
def test_a_fault_in_decoding_alone_fails(level: levels.Level) -> None:
    comparison = validate(Toy(), only_decoding(Toy(), lambda x: x * np.float32(1.5)), CASES, level, steps=4)
    assert not comparison.passed
    for case in comparison.cases:
        assert case.prefill.equal and case.failures and all(text.startswith("decode: ") for text in case.failures)


def off_by(cosine: float) -> Fault:
    """Logits turned so far that each row's cosine to what it was is this."""

    def turn(x: np.ndarray) -> np.ndarray:
        across = np.roll(x, 1, -1).astype(np.float64)
        across -= x * (across * x).sum(-1, keepdims=True) / np.square(x).sum(-1, keepdims=True)
        across *= np.linalg.norm(x, axis=-1, keepdims=True) / np.linalg.norm(across, axis=-1, keepdims=True)
        return (cosine * x + np.sqrt(1 - cosine**2) * across).astype(np.float32)

    return turn


def likelier_by(nats: float) -> Fault:
    """Each row's most likely token made less likely, and its least likely token likelier: by KL of about this."""

    def scale(x: np.ndarray) -> np.ndarray:
        low, high = 1.0, 3.0
        for _ in range(60):
            middle = (low + high) / 2
            enough = compare_logits(x, (x * np.float32(middle)).astype(np.float32)).kl_mean > nats
            low, high = (low, middle) if enough else (middle, high)
        return (x * np.float32(high)).astype(np.float32)

    return scale


@pytest.mark.parametrize(
    ("level", "limit", "fault", "metric"),
    [
        (levels.FP32, 1e-4, lambda x, off: x + np.float32(off), "max abs"),
        (levels.FP16, 1e-3, lambda x, off: off_by(1 - off)(x), "cosine"),
        (levels.BF16, 1e-2, lambda x, off: off_by(1 - off)(x), "cosine"),
        (levels.FP16, 2e-3, lambda x, off: likelier_by(off)(x), "mean KL"),
        (levels.BF16, 5e-2, lambda x, off: likelier_by(off)(x), "mean KL"),
    ],
)
def test_each_limit_is_where_it_is_said_to_be(level: levels.Level, limit: float, fault: Any, metric: str) -> None:
    """Half of what is allowed holds, twice as much fails."""
    case = [Case("one", (Prompt("a"),))]
    report = validate(Toy(), Toy(lambda x: fault(x, limit / 2)), case, level, steps=1)
    assert report.passed, report.cases[0].failures
    failed = validate(Toy(), Toy(lambda x: fault(x, limit * 2)), case, level, steps=1)
    assert any(f"prefill: {metric}" in text for text in failed.cases[0].failures)


@pytest.mark.parametrize(("level", "limit"), [(levels.FP16, 0.1), (levels.BF16, 0.8)])
def test_another_token_is_allowed_where_the_choice_was_close(level: levels.Level, limit: float) -> None:
    def difference(margin: float) -> LogitDifference:
        return compare_logits(np.array([[5.0, 5.0 - margin, 0]]), np.array([[5.0, 5.0001, 0]], np.float32))

    assert not [text for text in level.failures(difference(limit / 2)) if "nats" in text]
    assert [text for text in level.failures(difference(limit * 2)) if "nats" in text]


def test_one_wrong_token_fails_fp32_however_small() -> None:
    def swap(x: np.ndarray) -> np.ndarray:
        order = np.argsort(x, -1)
        y = x.copy()
        rows = np.arange(len(x))
        y[rows, order[:, -1]], y[rows, order[:, -2]] = x[rows, order[:, -2]], x[rows, order[:, -1]]
        return y

    report = validate(Toy(), Toy(swap), CASES, levels.FP32, steps=5)
    assert any("top-1" in failure for failure in report.cases[0].failures)
    assert report.cases[0].tokens_equal == 0


def test_the_first_wrong_layer_is_named() -> None:
    faulty = Toy(lambda x: x + np.float32(1), layer_faults={1: lambda v: v * 1.5, 2: lambda v: v * 9})
    report = validate(Toy(), faulty, CASES, levels.FP32, steps=2)
    assert (report.cases[0].first_wrong or "").startswith("hidden_states.1, row 0")
    broken = Toy(lambda x: x * np.float32("nan"), layer_faults={1: lambda v: v * np.nan, 2: lambda v: v * np.nan})
    first = validate(Toy(), broken, CASES, levels.FP32, steps=2).cases[0].first_wrong or ""
    assert first.startswith("hidden_states.1, row 0: ") and "NaN or infinite" in first
    one_token = Toy(
        lambda x: x + np.float32(1), {2: lambda v: v + np.eye(len(v), v.shape[1])[[1, 0, 2]] * [1, 3, 1, 1]}
    )
    first = validate(Toy(), one_token, CASES, levels.FP32, steps=2).cases[0].first_wrong or ""
    assert first.startswith("hidden_states.2, row 0: off by 3") and first.endswith("at token 0")
    missing = Toy(lambda x: x + np.float32(1))
    missing.tensors = lambda prompts: {}  # type: ignore[method-assign]
    assert validate(Toy(), missing, CASES, levels.FP32).cases[0].first_wrong == "hidden_states.0: missing"


def test_other_prompt_tokens_are_said_before_any_number() -> None:
    report = validate(Toy(), Toy(shift=1), CASES, levels.FP32, steps=2)
    assert report.cases[0].failures == ["row 0: the prompt becomes 3 tokens in one and 3 in the other, or other ones"]


def test_no_case_is_no_proof() -> None:
    assert not validate(Toy(), Toy(), [], levels.FP32).passed


def test_prompts_and_logits_of_other_lengths_fail_in_words() -> None:
    longer = Toy()
    longer.ids = lambda prompt: np.arange(5)  # type: ignore[method-assign]
    case = validate(Toy(), longer, CASES, levels.FP32, steps=2).cases[0]
    assert case.failures == ["row 0: the prompt becomes 3 tokens in one and 5 in the other, or other ones"]
    smaller = Toy(lambda x: x[:, :-1])
    case = validate(Toy(), smaller, CASES, levels.FP32, steps=2).cases[0]
    assert case.failures == [f"logits of other shapes: [3, {VOCAB}] and [3, {VOCAB - 1}]"]
    assert not case.prefill.equal and np.isnan(case.prefill.max_abs) and case.first_wrong is None


@pytest.mark.parametrize(
    ("stages", "dtypes", "expected"),
    [
        (("checkpoint", "checkpoint"), ("bf16", "bf16"), levels.IDENTITY),
        (("checkpoint", "checkpoint"), ("fp32", "bf16"), levels.BF16),
        (("checkpoint", "bundle"), ("fp32", "fp32"), levels.FP32),
        (("checkpoint", "bundle"), ("fp32", "fp16"), levels.FP16),
        (("bundle", "bundle"), ("fp16", "bf16"), levels.BF16),
    ],
)
def test_rungs(stages: Any, dtypes: Any, expected: levels.Level) -> None:
    assert levels.level_between(stages, dtypes) is expected


@pytest.mark.parametrize(("level", "limit"), [(levels.FP32, 0.01), (levels.FP16, 0.25), (levels.BF16, 0.7)])
def test_what_an_opened_graft_changes_is_judged_where_rounding_does_not_hide_it(
    level: levels.Level, limit: float
) -> None:
    quiet = limit * 0.01 / 2
    assert levels.effect_failures(level, Effect(0.01, quiet, limit / 2)) == ([], None)
    failures, hidden = levels.effect_failures(level, Effect(0.01, quiet, min(limit * 2, 1.0)))
    assert hidden is None and "off by" in failures[0]
    failures, hidden = levels.effect_failures(level, Effect(0.01, limit * 0.01, 1.0))
    assert failures == [] and "the grafts were not judged" in (hidden or "")
    assert levels.effect_failures(level, Effect(float("nan"), 0.0, float("nan")))[0]
