"""The levels of proof: which level lies between two runners, what it promises, and why its tolerance is what it is."""

import math
from dataclasses import dataclass

from surgeon.dtypes import PRECISIONS
from surgeon.parity.metrics import Effect, LogitDifference


@dataclass(frozen=True)
class Level:
    """What must hold between a reference and a candidate. None: reported, not judged.

    Tokens are compared greedily, the candidate fed the reference's tokens, so that one difference does not hide the
    rest.
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
    """From which relative difference on a layer counts as wrong, when a failed level is searched."""

    @property
    def judged(self) -> bool:
        """Whether anything but finite values must hold. A level that judges nothing proves nothing."""
        limits = (self.max_abs, self.min_cosine, self.max_kl_mean, self.min_top1, self.max_flip_margin)
        return self.bit_equal or any(limit is not None for limit in limits)

    def failures(self, difference: LogitDifference) -> list[str]:
        """What this difference breaks, in words; empty where the level holds."""
        if difference.non_finite:
            return [f"{difference.non_finite} NaN or infinite logits"]
        if math.isnan(difference.max_abs):
            return ["no logits to compare"]
        checks = [
            (self.bit_equal and not difference.equal, f"max abs {difference.max_abs:.3g}, bit-equality is promised"),
            (_over(difference.max_abs, self.max_abs), f"max abs {difference.max_abs:.3g} > {self.max_abs}"),
            (_over(self.min_cosine, difference.cosine), f"cosine {difference.cosine:.6f} < {self.min_cosine}"),
            (_over(difference.kl_mean, self.max_kl_mean), f"mean KL {difference.kl_mean:.3g} > {self.max_kl_mean}"),
            (
                _over(difference.flip_margin, self.max_flip_margin),
                f"another token where the reference's led by {difference.flip_margin:.3g} nats > "
                f"{self.max_flip_margin}",
            ),
            (_over(self.min_top1, difference.top1), f"top-1 {difference.top1:.4f} < {self.min_top1}"),
        ]
        return [text for broken, text in checks if broken]


def _over(value: float | None, limit: float | None) -> bool:
    return value is not None and limit is not None and value > limit


IDENTITY = Level(
    "identity",
    "what a closed gate lets through is exactly nothing: same operators, same kernels, same order",
    bit_equal=True,
    min_top1=1.0,
    layer_relative=0.0,
)
TUNED = Level("tuned", "training is meant to change the answers: what changed is reported, not judged")
MOVED = Level("positions", "tiles take other position ids, which changes the answers about them: reported, not judged")
FP32 = Level(
    "fp32",
    "the same arithmetic in another order: rounding of 2^-24 over some thousand additions a logit",
    max_abs=1e-4,
    min_top1=1.0,
)
FP16 = Level(
    "fp16",
    "11 bits of mantissa in every activation: about 5e-4 relative at each layer, which adds up over the depth as noise "
    "does; top-1 changes only where two tokens were nearly as likely",
    min_cosine=0.999,
    max_kl_mean=2e-3,
    max_flip_margin=0.1,
    layer_relative=2e-2,
)
BF16 = Level(
    "bf16",
    "8 bits of mantissa: eight times fp16's error, so about sixty times its KL, which is quadratic in it",
    min_cosine=0.99,
    max_kl_mean=5e-2,
    max_flip_margin=0.8,
    layer_relative=1e-1,
)
_BY_DTYPE = {"fp32": FP32, "fp16": FP16, "bf16": BF16}
MAX_EFFECT_ERROR = {"fp32": 0.01, "fp16": 0.25, "bf16": 0.7}
"""By the name of a level: how far what a graft does to the logits may be from what it does in the reference, as a share
of that. Keys and values exchanged, or a graft left out, make it 1 and more; rounding makes it the smaller the more the
graft does."""


def level_between(stages: tuple[str, str], dtypes: tuple[str, str]) -> Level:
    """What must hold from a reference to a candidate where nothing sets them apart but their form and dtype.

    stages: `checkpoint`, `bundle` or `engine`, each.
    """
    if stages == ("checkpoint", "checkpoint") and dtypes[0] == dtypes[1]:
        return IDENTITY
    return _BY_DTYPE[max(dtypes, key=list(PRECISIONS).index)]


def effect_failures(level: Level, effect: Effect) -> tuple[list[str], str | None]:
    """What an opened graft's effect breaks, in words, and where rounding hides the effect, which proves nothing, why it
    was not judged."""
    limit = MAX_EFFECT_ERROR[level.name]
    if math.isnan(effect.error):
        return ["what the grafts change is NaN or infinite in one of the two"], None
    if effect.noise > 0.85 * limit * effect.size:
        return [], (
            f"the grafts were not judged: opened, they change the logits by {effect.size:.2g} of their size, which "
            f"{level.name}'s rounding of {effect.noise:.2g} hides; compare an fp32 bundle"
        )
    if effect.error > limit:
        return [f"what the grafts change is off by {effect.error:.3g} of it > {limit}"], None
    return [], None
