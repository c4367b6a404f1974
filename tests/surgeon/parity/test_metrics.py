import numpy as np
import pytest
import torch

from surgeon.parity.metrics import compare, compare_effect, compare_logits


def test_difference_of_known_arrays() -> None:
    diff = compare(np.array([1.0, -2.0, 4.0], np.float32), np.array([1.0, -2.5, 4.0], np.float32))
    assert (diff.max_abs, diff.max_relative, diff.equal, diff.non_finite) == (0.5, 0.125, False, 0)
    assert diff.mean_abs == pytest.approx(0.5 / 3)
    assert diff.cosine == pytest.approx((1 + 5 + 16) / np.sqrt(21 * 23.25))


def test_non_finite_values_are_counted_and_nothing_else_is_said() -> None:
    diff = compare_logits(np.array([[1.0, np.nan]]), np.array([[np.inf, 2.0]]))
    assert diff.non_finite == 2
    assert not diff.equal and np.isnan([diff.max_abs, diff.cosine, diff.kl_mean, diff.top1]).all()


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3\] and \[2, 4\]"):
        compare(np.zeros((2, 3)), np.zeros((2, 4)))


def test_kl_and_top1_against_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 40, generator=generator) * 3, torch.randn(5, 40, generator=generator) * 3
    b[:3] = a[:3] + 0.1 * b[:3]
    p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    diff = compare_logits(a.numpy(), b.numpy())
    assert diff.kl_mean == pytest.approx(float(kl.mean()), rel=1e-9)
    assert diff.kl_max == pytest.approx(float(kl.max()), rel=1e-9)
    assert diff.top1 == float((a.argmax(-1) == b.argmax(-1)).double().mean())
    lost = a.max(-1).values - a[range(5), b.argmax(-1)]
    assert diff.flip_margin == pytest.approx(float(lost.max())) and diff.flip_margin > 0
    assert diff.cosine == pytest.approx(float(torch.cosine_similarity(a.double(), b.double()).min()))


def test_equal_logits() -> None:
    logits = np.random.default_rng(0).standard_normal((3, 10)).astype(np.float32)
    diff = compare_logits(logits, logits.copy())
    assert diff.equal and diff.max_abs == diff.kl_max == 0 and diff.top1 == 1


def test_the_effect_of_a_change() -> None:
    before = [(np.array([[3.0, 4.0]]), np.array([[3.0, 4.0]]))]
    after = np.array([[3.0, 5.0]])
    same = compare_effect(before, [(after, after)])
    assert (same.size, same.noise, same.error) == pytest.approx((0.2, 0, 0))
    assert compare_effect(before, [(after, before[0][1])]).error == pytest.approx(1)  # left out
    assert compare_effect(before, [(after, np.array([[4.0, 4.0]]))]).error == pytest.approx(2**0.5)  # another
    off = [(before[0][0], before[0][1] + 0.1)]
    steady = compare_effect(off, [(after, after + 0.1)])  # an error of the rest is no error of the change
    assert (steady.noise, steady.error) == pytest.approx((0.1 * 2**0.5 / 5, 0))
    twice = compare_effect(before * 2, [(after, before[0][1]), (after, after)])  # left out in one case of two
    assert (twice.size, twice.error) == pytest.approx((0.2, 0.5**0.5))
    nothing = compare_effect(before, before)
    assert (nothing.size, nothing.error) == (0, 0)
    assert np.isnan(compare_effect(before, [(after, np.array([[np.inf, 4.0]]))]).error)
