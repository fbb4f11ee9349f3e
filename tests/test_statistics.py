"""Statistics against worked examples and brute force."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.offline import roc
from eval.statistics import mcnemar, paired_difference, wilson


def pairs(both, only_t, only_c, neither):
    t = [1] * both + [1] * only_t + [0] * only_c + [0] * neither
    c = [1] * both + [0] * only_t + [1] * only_c + [0] * neither
    return t, c


def test_wilson_published_examples():
    """Newcombe (1998), two-sided intervals for a single proportion: 81/263, 15/148, 0/20, 1/29."""
    for (r, n), interval in {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0, 0.1611)}.items():
        assert wilson(r, n) == pytest.approx(interval, abs=2e-4)


def test_paired_difference_published_examples():
    """Newcombe (1998), paired differences, method 10: cells (36, 12, 2, 0); without discordance the margins' own."""
    d, interval = paired_difference(*pairs(36, 12, 2, 0))
    assert d == pytest.approx(0.20) and interval == pytest.approx((0.0569, 0.3404), abs=2e-4)
    d, interval = paired_difference(*pairs(20, 0, 0, 0))
    assert d == 0 and interval == pytest.approx((-0.1611, 0.1611), abs=2e-4)


@given(st.integers(0, 6), st.integers(0, 6))
def test_mcnemar_is_the_exact_sign_test(b, c):
    n = b + c
    outcomes = [abs(2 * sum(o) - n) >= abs(b - c) for o in product((0, 1), repeat=n)]
    assert mcnemar(*pairs(3, b, c, 2)) == pytest.approx(np.mean(outcomes))


@given(st.integers(0, 50), st.integers(0, 10), st.integers(0, 10), st.integers(0, 50))
def test_intervals_hold_their_estimate(both, only_t, only_c, neither):
    if both + only_t + only_c + neither == 0:
        return
    d, (low, high) = paired_difference(*pairs(both, only_t, only_c, neither))
    assert -1 <= low <= d + 1e-9 and d - 1e-9 <= high <= 1
    mirrored, (a, b) = paired_difference(*reversed(pairs(both, only_t, only_c, neither)))
    assert (mirrored, a, b) == pytest.approx((-d, -high, -low), abs=1e-9)


@given(st.integers(0, 10**6))
def test_roc_area_agrees_with_scikit_learn(seed):
    from sklearn.metrics import roc_auc_score

    g = np.random.default_rng(seed)
    score, positive = np.round(g.random(60), 1), g.random(60) < 0.4
    if positive.any() and not positive.all():
        assert roc(score, positive)[2] == pytest.approx(roc_auc_score(positive, score))


@pytest.mark.parametrize(("p_control", "loss", "gain"), [(0.98, 0.03, 0.01), (0.9, 0.05, 0.02), (0.6, 0.1, 0.1)])
def test_paired_interval_covers_the_true_difference(p_control, loss, gain):
    """Over 2,000 draws of 200 pairs the 95 % interval holds the true difference in 93 % or more."""
    g = np.random.default_rng(0)
    truth = (1 - p_control) * gain - p_control * loss
    covered = 0
    for _ in range(2000):
        control = g.random(200) < p_control
        treated = np.where(control, g.random(200) >= loss, g.random(200) < gain)
        low, high = paired_difference(treated, control)[1]
        covered += low <= truth <= high
    assert covered / 2000 >= 0.93
