"""Intervals and tests for success rates, unpaired and paired.

Wilson's score interval for one rate and the exact McNemar test are SciPy's. Newcombe's hybrid score interval (his method 10)
is for the difference of paired rates (Newcombe, Statistics in Medicine 17, 1998).
"""

from __future__ import annotations

from math import sqrt

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95 % score interval of a rate; (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    interval = binomtest(successes, trials).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def paired_difference(treated: ArrayLike, control: ArrayLike) -> tuple[float, tuple[float, float]]:
    """Difference of success rates, treated minus control, over pairs (N,), and its 95 % interval."""
    t, c = np.asarray(treated, bool), np.asarray(control, bool)
    if t.shape != c.shape or t.ndim != 1 or not len(t):
        raise ValueError(f"paired outcomes must be two equally long vectors, got {t.shape} and {c.shape}")
    n = len(t)
    both, only_t, only_c, neither = (int((x & y).sum()) for x, y in ((t, c), (t, ~c), (~t, c), (~t, ~c)))
    p1, p2 = (both + only_t) / n, (both + only_c) / n
    (l1, u1), (l2, u2) = wilson(both + only_t, n), wilson(both + only_c, n)
    margins = (both + only_t) * (only_c + neither) * (both + only_c) * (only_t + neither)
    phi = 0.0
    if margins:
        determinant = both * neither - only_t * only_c
        corrected = max(determinant - n / 2, 0.0) if determinant > 0 else determinant
        phi = corrected / sqrt(margins)
    d = p1 - p2
    low = d - sqrt(max(0.0, (p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2))
    high = d + sqrt(max(0.0, (p2 - l2) ** 2 - 2 * phi * (p2 - l2) * (u1 - p1) + (u1 - p1) ** 2))
    return d, (max(-1.0, low), min(1.0, high))


def mcnemar(treated: ArrayLike, control: ArrayLike) -> float:
    """Two-sided exact p-value of equal success rates over pairs (N,); 1 without discordant pairs."""
    t, c = np.asarray(treated, bool), np.asarray(control, bool)
    gained, lost = int((t & ~c).sum()), int((~t & c).sum())
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def mean_and_error(values: ArrayLike) -> tuple[float, float]:
    """Mean and its standard error."""
    x = np.asarray(values, np.float64)
    if not len(x):
        return float("nan"), float("nan")
    return float(x.mean()), float(x.std(ddof=1) / sqrt(len(x))) if len(x) > 1 else float("nan")
