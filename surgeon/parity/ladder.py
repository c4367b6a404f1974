"""The ladder of proof: which rung lies between two subjects, what it promises, and why its tolerance is what it is."""

import math
from dataclasses import dataclass

from surgeon.parity.metrics import LogitDifference


@dataclass(frozen=True)
class Rung:
    """What must hold between a reference and a subject. None: reported, not judged.

    Tokens are compared greedily, the subject fed the reference's tokens, so that one difference does not hide the rest.
    """

    name: str
    why: str
    bit_equal: bool = False
    max_abs: float | None = None
    min_cosine: float | None = None
    max_kl_mean: float | None = None
    min_top1: float | None = None
    max_flip_margin: float | None = None
    """In nats. The share of changed tokens says little about a short prompt; how clear the lost choice was does."""
    layer_relative: float = 1e-3
    """From which relative difference on a layer counts as wrong, when a failed rung is searched."""

    def failures(self, found: LogitDifference) -> list[str]:
        """What this difference breaks, in words; empty where the rung holds."""
        if found.non_finite:
            return [f"{found.non_finite} NaN or infinite logits"]
        if math.isnan(found.max_abs):
            return ["no logits to compare"]
        checks = [
            (self.bit_equal and not found.equal, f"max abs {found.max_abs:.3g}, bit-equality is promised"),
            (_over(found.max_abs, self.max_abs), f"max abs {found.max_abs:.3g} > {self.max_abs}"),
            (_over(self.min_cosine, found.cosine), f"cosine {found.cosine:.6f} < {self.min_cosine}"),
            (_over(found.kl_mean, self.max_kl_mean), f"mean KL {found.kl_mean:.3g} > {self.max_kl_mean}"),
            (
                _over(found.flip_margin, self.max_flip_margin),
                f"another token where the reference's led by {found.flip_margin:.3g} nats > {self.max_flip_margin}",
            ),
            (_over(self.min_top1, found.top1), f"top-1 {found.top1:.4f} < {self.min_top1}"),
        ]
        return [text for broken, text in checks if broken]


def _over(value: float | None, limit: float | None) -> bool:
    return value is not None and limit is not None and value > limit


IDENTITY = Rung(
    "identity",
    "a fresh graft adds exactly nothing: same operators, same kernels, same order",
    bit_equal=True,
    min_top1=1.0,
    layer_relative=0.0,
)
TUNED = Rung("tuned", "a trained graft is meant to change the answers: what changed is reported, not judged")
MOVED = Rung(
    "positions",
    "tiles take other position ids, which changes the answers about them: reported, not judged; --positions plain "
    "compares the rest",
)
FP32 = Rung(
    "fp32",
    "the same arithmetic in another order: rounding of 2^-24 over some thousand additions a logit",
    max_abs=1e-4,
    min_top1=1.0,
)
FP16 = Rung(
    "fp16",
    "11 bits of mantissa in every activation: about 5e-4 relative at each layer, which adds up over the depth as noise "
    "does; top-1 changes only where two tokens were nearly as likely",
    min_cosine=0.999,
    max_kl_mean=2e-3,
    max_flip_margin=0.1,
    layer_relative=2e-2,
)
BF16 = Rung(
    "bf16",
    "8 bits of mantissa: eight times fp16's error, so about sixty times its KL, which is quadratic in it",
    min_cosine=0.99,
    max_kl_mean=5e-2,
    max_flip_margin=0.8,
    layer_relative=1e-1,
)
_BY_DTYPE = {"fp32": FP32, "fp16": FP16, "bf16": BF16}
_PRECISION = ("fp32", "fp16", "bf16")


def rung_between(stages: tuple[str, str], dtypes: tuple[str, str], identity: bool) -> Rung:
    """The rung from a reference to a subject.

    stages: `checkpoint` or `bundle`, each. identity: whether every gate is closed, so that a patch promises equality.
    """
    if stages == ("checkpoint", "checkpoint"):
        return IDENTITY if identity else TUNED
    return _BY_DTYPE[max(dtypes, key=_PRECISION.index)]
