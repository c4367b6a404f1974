"""How far two tensors are from each other. Non-finite values are counted before anything is compared."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Difference:
    """A tensor against its reference, over all their elements."""

    max_abs: float
    mean_abs: float
    max_relative: float
    """max_abs over the reference's largest absolute value."""
    cosine: float
    non_finite: int
    """NaN and infinity in either. Where there are any, nothing else was compared and the rest is NaN."""
    equal: bool
    """Bit for bit, but for the sign of zero."""


@dataclass(frozen=True)
class LogitDifference(Difference):
    """Logits against reference logits, each position a distribution over the vocabulary."""

    kl_mean: float
    """Mean over positions of KL(reference || other), in nats."""
    kl_max: float
    top1: float
    """The share of positions with the same most likely token."""
    flip_margin: float
    """The most, in nats, by which the reference preferred its own most likely token to the other's; 0 without flips."""


@dataclass(frozen=True)
class Effect:
    """What opening gates does to logits, all Euclidean norms over every row and token of the vocabulary."""

    size: float
    """Of the change in the reference's logits, over those logits."""
    noise: float
    """Of the other's difference from the reference before the gates were opened, over the reference's logits."""
    error: float
    """Of the difference between the two changes, over the reference's change."""


def compare(reference: np.ndarray, other: np.ndarray) -> Difference:
    """Any two arrays of one shape. Computed in fp64. Raises ValueError where the shapes differ."""
    if reference.shape != other.shape:
        raise ValueError(f"shapes differ: {list(reference.shape)} and {list(other.shape)}")
    non_finite = int((~np.isfinite(reference)).sum() + (~np.isfinite(other)).sum())
    nan = float("nan")
    if non_finite or reference.size == 0:
        return Difference(nan, nan, nan, nan, non_finite, equal=False)
    a, b = reference.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    error = np.abs(a - b)
    scale, norms = float(np.abs(a).max()), float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float(a @ b) / norms if norms else float(np.array_equal(a, b))
    largest = float(error.max())
    relative = largest / scale if scale else (0.0 if largest == 0 else float("inf"))
    return Difference(largest, float(error.mean()), relative, cosine, 0, bool(np.array_equal(reference, other)))


def compare_logits(reference: np.ndarray, other: np.ndarray) -> LogitDifference:
    """Logits [P, V] of P positions. The cosine is the smallest over positions."""
    plain = compare(reference, other)
    nan = float("nan")
    if plain.non_finite or reference.size == 0:
        return LogitDifference(**vars(plain), kl_mean=nan, kl_max=nan, top1=nan, flip_margin=nan)
    kls, cosines = [], []
    for a, b in zip(reference, other, strict=True):  # position by position: a vocabulary times fp64 is large
        log_p, log_q = _log_softmax(a.astype(np.float64)), _log_softmax(b.astype(np.float64))
        kls.append(max(0.0, float(np.exp(log_p) @ (log_p - log_q))))
        cosines.append(compare(a, b).cosine)
    top1 = float((reference.argmax(-1) == other.argmax(-1)).mean())
    other_top_logits = np.take_along_axis(reference, other.argmax(-1)[:, None], -1)[:, 0]
    flip_margin = float((reference.max(-1) - other_top_logits).max())
    values = {**vars(plain), "cosine": min(cosines)}
    return LogitDifference(**values, kl_mean=float(np.mean(kls)), kl_max=max(kls), top1=top1, flip_margin=flip_margin)


def not_compared() -> LogitDifference:
    """Of logits that have nothing to do with each other: every value NaN."""
    nan = float("nan")
    return LogitDifference(nan, nan, nan, nan, 0, False, kl_mean=nan, kl_max=nan, top1=nan, flip_margin=nan)


def compare_effect(
    before: Sequence[tuple[np.ndarray, np.ndarray]], after: Sequence[tuple[np.ndarray, np.ndarray]]
) -> Effect:
    """`before`, `after`: pairs of the reference's and the other's logits, of one shape, for the same prompts. NaN
    where a logit is not finite."""
    total = change = noise = error = 0.0
    for (a, b), (c, d) in zip(before, after, strict=True):
        a, b, c, d = (np.where(np.isfinite(part), part, np.nan).astype(np.float64) for part in (a, b, c, d))
        total += float(np.square(a).sum())
        change += float(np.square(c - a).sum())
        noise += float(np.square(b - a).sum())
        error += float(np.square((d - b) - (c - a)).sum())
    if not change:
        return Effect(0.0, float(np.sqrt(noise / total)), float("inf") if error else 0.0)
    return Effect(*(float(np.sqrt(x)) for x in (change / total, noise / total, error / change)))


def _log_softmax(x: np.ndarray) -> np.ndarray:
    shifted: np.ndarray = x - x.max()
    return shifted - np.log(np.exp(shifted).sum())
