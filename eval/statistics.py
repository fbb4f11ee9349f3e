"""Intervals and tests for success rates, unpaired and paired, that hold near 100 % too.

The exact (Clopper-Pearson) interval of one rate and the exact McNemar test are SciPy's. Newcombe's hybrid score interval (his
method 10) is for the difference of paired rates (Newcombe, Statistics in Medicine 17, 1998). Enumerated over all outcomes of 30
to 500 pairs at rates of 0.9 to 1, both hold the truth in 95 % of experiments or more, where Wilson's interval of one rate, and
Tango's score interval of the difference, do not.
"""

from __future__ import annotations

from bisect import bisect_left
from math import sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, norm

Z = float(norm.ppf(0.975))


def exact_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % Clopper-Pearson interval of a rate: it covers in 95 % or more of all experiments. (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    interval = binomtest(successes, trials).proportion_ci(method="exact")
    return float(interval.low), float(interval.high)


def paired_difference(treated: ArrayLike, control: ArrayLike) -> tuple[float, tuple[float, float]]:
    """Difference of success rates, treated minus control, over pairs (N,), and its 95 % interval."""
    both, only_t, only_c, neither = _table(treated, control)
    low, high = newcombe(both, only_t, only_c, neither)
    return (only_t - only_c) / (both + only_t + only_c + neither), (float(low), float(high))


def newcombe(
    both: ArrayLike, only_treated: ArrayLike, only_control: ArrayLike, neither: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Newcombe's 95 % interval of the difference of paired rates, treated minus control; any shapes that broadcast.

    Args:
        both, only_treated, only_control, neither: how many pairs succeeded in which way; fractions of pairs too.
    """
    a, b, c, d = (np.asarray(x, np.float64) for x in (both, only_treated, only_control, neither))
    n = a + b + c + d
    p1, p2 = (a + b) / n, (a + c) / n
    (l1, u1), (l2, u2) = _wilson(p1, n), _wilson(p2, n)
    determinant = a * d - b * c
    corrected = np.where(determinant > 0, np.maximum(determinant - n / 2, 0), determinant)
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    phi = np.where(margins > 0, corrected / np.sqrt(np.where(margins > 0, margins, 1)), 0)
    below = (p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2
    above = (p2 - l2) ** 2 - 2 * phi * (p2 - l2) * (u1 - p1) + (u1 - p1) ** 2
    low, high = p1 - p2 - np.sqrt(np.maximum(below, 0)), p1 - p2 + np.sqrt(np.maximum(above, 0))
    return np.maximum(low, -1.0), np.minimum(high, 1.0)


def pairs_needed(treated: ArrayLike, control: ArrayLike, half_width: float = 0.01) -> int:
    """How many pairs would give a 95 % interval of plus or minus ``half_width``, by default one point: with as many discordant
    pairs as over these (N,), in parts, but no difference."""
    both, only_t, only_c, neither = (x / len(np.asarray(treated)) for x in _table(treated, control))
    discordant = (only_t + only_c) / 2

    def narrow(n: int) -> bool:
        low, high = newcombe(n * both, n * discordant, n * discordant, n * neither)
        return bool(high - low <= 2 * half_width)

    return bisect_left(range(10**7), True, lo=1, key=narrow)


def mcnemar(treated: ArrayLike, control: ArrayLike) -> float:
    """Two-sided exact p-value of equal success rates over pairs (N,); 1 without discordant pairs."""
    _, gained, lost, _ = _table(treated, control)
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def mean_and_error(values: ArrayLike) -> tuple[float, float]:
    """Mean and its standard error."""
    x = np.asarray(values, np.float64)
    if not len(x):
        return float("nan"), float("nan")
    return float(x.mean()), float(x.std(ddof=1) / sqrt(len(x))) if len(x) > 1 else float("nan")


def _table(treated: ArrayLike, control: ArrayLike) -> tuple[int, int, int, int]:
    """Pairs by who succeeded: both, only treated, only control, neither."""
    t, c = np.asarray(treated, bool), np.asarray(control, bool)
    if t.shape != c.shape or t.ndim != 1 or not len(t):
        raise ValueError(f"paired outcomes must be two equally long vectors, got {t.shape} and {c.shape}")
    return int((t & c).sum()), int((t & ~c).sum()), int((~t & c).sum()), int((~t & ~c).sum())


def _wilson(rate: NDArray[np.float64], n: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Wilson's 95 % score interval of a rate over n trials: SciPy's takes one integer at a time."""
    middle = (rate + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * np.sqrt(rate * (1 - rate) / n + Z**2 / (4 * n**2))
    return middle - half, middle + half
