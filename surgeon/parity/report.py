"""The verdict on two forms of a model, and what it rests on."""

from dataclasses import asdict, dataclass, field
from typing import Any

from surgeon.parity.validate import Comparison, Verdict
from surgeon.version import __version__


@dataclass
class Check:
    """Something that is right or wrong of itself, without logits: tensors, inputs, bytes."""

    name: str
    said: str
    """What was compared with what."""
    failures: list[str] = field(default_factory=list)


@dataclass
class Report:
    """The verdict on a pair, or without a `reference` on bytes alone."""

    candidate: str
    stages: tuple[str, ...]
    """The reference's and the candidate's: `checkpoint`, `bundle` or `engine`."""
    dtypes: tuple[str, ...]
    """Of the same two; of bytes none."""
    reference: str | None = None
    checks: list[Check] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    remedy: str = "no case was compared; give a prompt that fits both"
    """What to do where nothing was judged."""
    nothing_proved: bool = False
    """What was judged says nothing of what was asked: a verdict that is not `failed` is `not judged`."""
    seconds: float = 0.0
    version: str = __version__

    @property
    def verdict(self) -> Verdict:
        """`passed` where nothing failed and something was judged: of two forms their logits, else their bytes."""
        if any(check.failures for check in self.checks) or any(c.verdict == "failed" for c in self.comparisons):
            return "failed"
        if self.nothing_proved:
            return "not judged"
        judged = [c for c in self.comparisons if c.verdict == "passed"] if self.reference else self.checks
        return "passed" if judged else "not judged"

    @property
    def passed(self) -> bool:
        return self.verdict == "passed"

    def all_notes(self) -> list[str]:
        """Each once: those of the pair, then those of the comparisons."""
        return list(
            dict.fromkeys([*self.notes, *(note for comparison in self.comparisons for note in comparison.notes)])
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "verdict": self.verdict,
            "reference": self.reference,
            "candidate": self.candidate,
            "stages": self.stages,
            "dtypes": self.dtypes,
            "checks": [asdict(check) for check in self.checks],
            "comparisons": [comparison.to_json() for comparison in self.comparisons],
            "notes": self.all_notes(),
            **({"remedy": self.remedy} if self.verdict == "not judged" else {}),
            "seconds": self.seconds,
            "version": self.version,
        }
