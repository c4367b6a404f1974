"""The validator on subjects whose faults are known."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from surgeon.inputs import Prompt
from surgeon.parity import ladder
from surgeon.parity.cases import Case
from surgeon.parity.subject import Trace
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
        found = {}
        for layer in range(LAYERS):
            values = [np.outer(self.ids(p) + 1.0, np.arange(1, 5)) * (layer + 1) for p in prompts]
            found[f"hidden_states.{layer}"] = [self.layer_faults.get(layer, lambda x: x)(v) for v in values]
        return found


def test_the_same_model_passes_every_rung() -> None:
    for rung in (ladder.IDENTITY, ladder.FP32, ladder.FP16, ladder.BF16, ladder.TUNED):
        report = validate(Toy(), Toy(), CASES, rung, steps=5)
        assert report.passed and [case.tokens_equal for case in report.cases] == [5, 10]


@pytest.mark.parametrize(
    ("fault", "rung", "said"),
    [
        (lambda x: x * np.float32(1 + 1e-6), ladder.IDENTITY, "bit-equality"),
        (lambda x: x + np.float32(1e-3), ladder.FP32, "max abs"),
        (lambda x: -x, ladder.FP16, "cosine"),
        (lambda x: x * np.float32(1.5), ladder.BF16, "mean KL"),
        (lambda x: np.roll(x, 1, -1), ladder.FP16, "nats"),
        (lambda x: np.where(x == x.max(), np.float32(np.nan), x), ladder.TUNED, "NaN or infinite"),
        (lambda x: x * np.float32(np.inf), ladder.BF16, "NaN or infinite"),
    ],
)
def test_a_fault_fails_its_rung(fault: Fault, rung: ladder.Rung, said: str) -> None:
    report = validate(Toy(), Toy(fault), CASES, rung, steps=5)
    assert not report.passed
    assert any(said in failure for case in report.cases for failure in case.failures)
    assert report.to_json()["passed"] is False


def test_one_wrong_token_fails_fp32_however_small() -> None:
    def swap(x: np.ndarray) -> np.ndarray:
        order = np.argsort(x, -1)
        y = x.copy()
        rows = np.arange(len(x))
        y[rows, order[:, -1]], y[rows, order[:, -2]] = x[rows, order[:, -2]], x[rows, order[:, -1]]
        return y

    report = validate(Toy(), Toy(swap), CASES, ladder.FP32, steps=5)
    assert any("top-1" in failure for failure in report.cases[0].failures)
    assert report.cases[0].tokens_equal == 0


def test_the_first_wrong_layer_is_named() -> None:
    faulty = Toy(lambda x: x + np.float32(1), layer_faults={1: lambda v: v * 1.5, 2: lambda v: v * 9})
    report = validate(Toy(), faulty, CASES, ladder.FP32, steps=2)
    assert (report.cases[0].first_wrong or "").startswith("hidden_states.1, row 0")
    missing = Toy(lambda x: x + np.float32(1))
    missing.tensors = lambda prompts: {}  # type: ignore[method-assign]
    assert validate(Toy(), missing, CASES, ladder.FP32).cases[0].first_wrong == "hidden_states.0: missing"


def test_other_prompt_tokens_are_said_before_any_number() -> None:
    report = validate(Toy(), Toy(shift=1), CASES, ladder.FP32, steps=2)
    assert report.cases[0].failures == ["row 0: the prompt becomes 3 tokens in one and 3 in the other, or other ones"]


def test_no_case_is_no_proof() -> None:
    assert not validate(Toy(), Toy(), [], ladder.FP32).passed


@pytest.mark.parametrize(
    ("stages", "dtypes", "identity", "expected"),
    [
        (("checkpoint", "checkpoint"), ("bf16", "bf16"), True, ladder.IDENTITY),
        (("checkpoint", "checkpoint"), ("bf16", "bf16"), False, ladder.TUNED),
        (("checkpoint", "bundle"), ("fp32", "fp32"), False, ladder.FP32),
        (("checkpoint", "bundle"), ("fp32", "fp16"), True, ladder.FP16),
        (("bundle", "bundle"), ("fp16", "bf16"), True, ladder.BF16),
    ],
)
def test_rungs(stages: Any, dtypes: Any, identity: bool, expected: ladder.Rung) -> None:
    assert ladder.rung_between(stages, dtypes, identity) is expected
