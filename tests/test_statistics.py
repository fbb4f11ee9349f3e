"""Statistics against worked examples and brute force."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, multinomial

from eval.offline import roc
from eval.statistics import exact_interval, mcnemar, newcombe, paired_difference, pairs_needed


def pairs(both, only_t, only_c, neither):
    t = [1] * both + [1] * only_t + [0] * only_c + [0] * neither
    c = [1] * both + [0] * only_t + [1] * only_c + [0] * neither
    return t, c


def test_exact_interval_published_examples():
    """Newcombe (1998), two-sided intervals for a single proportion, method 5: 81/263, 15/148, 0/20, 1/29."""
    published = {(81, 263): (0.2527, 0.3676), (15, 148): (0.0578, 0.1617), (0, 20): (0, 0.1684), (1, 29): (0.0009, 0.1776)}
    for (r, n), interval in published.items():
        assert exact_interval(r, n) == pytest.approx(interval, abs=1e-4)
    assert exact_interval(0, 0) == (0, 1)


@pytest.mark.parametrize("n", [30, 50, 100, 200, 500])
def test_the_interval_of_a_rate_covers_near_100_percent(n):
    """Over all outcomes of n trials: the exact one in 95 % or more; Wilson's, which was here before, falls below 90 %."""
    counts, rates = np.arange(n + 1), 1 - np.geomspace(1e-4, 0.1, 200)
    weights = binom.pmf(counts, n, rates[:, None])
    wilson = [binomtest(k, n).proportion_ci(method="wilson") for k in counts]
    low, high = np.array([exact_interval(k, n) for k in counts]).T
    assert (weights * ((low <= rates[:, None]) & (rates[:, None] <= high))).sum(1).min() >= 0.95
    low, high = np.array(wilson).T
    assert (weights * ((low <= rates[:, None]) & (rates[:, None] <= high))).sum(1).min() < 0.9


@pytest.mark.parametrize("n", [30, 50, 100, 200, 500])
def test_the_interval_of_a_paired_difference_covers_near_100_percent(n):
    """Over all outcomes of n pairs that have a chance: rates of 0.9 to 1, with few and many discordant pairs."""
    shares = np.array([0, 0.2 / n, 1 / n, 3 / n, 0.02, 0.05, 0.08])
    grid = np.stack(np.meshgrid(shares, shares, [0, 1 / n, 0.04], indexing="ij"), -1).reshape(-1, 3)
    grid = grid[(grid[:, 0] + grid[:, 2] <= 0.1) & (grid[:, 1] + grid[:, 2] <= 0.1) & (grid[:, 0] >= grid[:, 1])]
    assert len(grid) > 30
    for only_t, only_c, neither in grid:
        most = [int(binom.isf(1e-5, n, share)) + 1 if share else 1 for share in (only_t, only_c, neither)]
        b, c, d = (x.ravel() for x in np.meshgrid(*map(np.arange, most), indexing="ij"))
        outcomes = np.stack([n - b - c - d, b, c, d], -1)[b + c + d <= n]
        weights = multinomial.pmf(outcomes, n, [1 - only_t - only_c - neither, only_t, only_c, neither])
        low, high = newcombe(*outcomes.T)
        truth = only_t - only_c
        assert weights.sum() > 0.9999
        assert (weights * ((low <= truth) & (truth <= high))).sum() >= 0.95 - 0.001, (only_t, only_c, neither)


def test_how_many_pairs_an_interval_of_one_point_needs():
    """Without discordance the interval is +- z^2 / (n + z^2); with some, the pairs told give it, and one less does not."""
    assert pairs_needed([1] * 50, [1] * 50) == int(np.ceil(3.8415 * 0.99 / 0.01))
    outcome = pairs(180, 6, 10, 4)
    needed = pairs_needed(*outcome)
    for n, enough in ((needed, True), (needed - 1, False)):
        low, high = newcombe(0.9 * n, 0.04 * n, 0.04 * n, 0.02 * n)
        assert (high - low <= 0.02) == enough
    assert needed == pytest.approx(1.96**2 * 0.08 / 0.01**2, rel=0.05)


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
