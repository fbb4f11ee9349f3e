"""The risk of episodes whose generated steps were labelled by a coin: a robot's own recordings with audits.

At step t of an episode of T steps a coin with probability q_t, thrown before anything is known of the answer, decides whether
the VLA says what it would have done; where the VLA acts anyway, q_t = 1. Let l_t(s) = 1 if the step would be generated at
threshold s and deviates. The episode's loss is the mean of l_t; of it the labels show

    W(s) = (1/T) sum over labelled t of l_t(s) / q_t,

which has the same mean over the coins (Horvitz and Thompson, 1952): each coin is independent of its step's loss, given
everything before. Conformal risk control needs losses below a bound B and takes the largest threshold with (n R + B) / (n + 1)
<= risk. W is only below 1/p, where p is the least of the q_t: with p = 0.1 and 100 episodes that alone would be 0.1. But how
probable it is that W is large can be computed. Whatever the losses are, and even if they depend on earlier coins, the mean
of any increasing convex function of W is largest if l_t = 1 and q_t = p in every step; then W is X = Binomial(T, p) / (p T).
So for any cap c

    E[loss] = E[W] <= E[min(W, c)] + E[(X - c)^+].

For a given B let c_T be the largest c with c + E[(X - c)^+] <= B. Then

    min(W(s), c_T) + B - c_T

is at most B, does not fall as s rises, and its mean is at least that of the loss. Conformal risk control on it keeps the
expected *true* loss of a new episode at most at the risk, for any B in [1, 1/p] that does not depend on the data. A short
episode, about which few coins say little, has a small c_T and counts as nearly lost; with 100 steps, p = 0.1 and B = 2 the
price of the cap is 0.0002. With q_t = 1 everywhere, W, B = 1 and c = 1 give the bound for fully labelled episodes.

Taken as given are the states of the recording and its length. An executed audit steers the robot, so the length depends a
little on the coins; that is neglected, as is that a live threshold carries over from one episode to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spvla.errors import InputError

TYPICAL_STEPS = 100  # of an episode, for the choice of B alone


def audited_risk(
    probability: Sequence[ArrayLike],
    deviates: Sequence[ArrayLike],
    propensities: Sequence[ArrayLike],
    thresholds: NDArray[np.float64],
) -> tuple[NDArray[np.float64], float]:
    """The bound of the risk at each of ascending thresholds, (M,), and what it would be if nothing deviated.

    Args:
        probability: per episode, the lowest threshold at which each step is generated, (T_i,).
        deviates: per episode, whether a step is labelled and its proposal deviates from the label, (T_i,).
        propensities: per episode, q_t in (0, 1], (T_i,).
        thresholds: (M,).

    Raises:
        InputError: a propensity outside of (0, 1].
    """
    n = len(probability)
    chances = [np.asarray(q, np.float64) for q in propensities]
    if any(not ((q > 0) & (q <= 1)).all() for q in chances):
        told = "calibration: propensities must be more than 0 and at most 1"
        raise InputError(told, code="damaged", field="vla_propensity")
    least = float(min(q.min(initial=1.0) for q in chances))
    bound = largest_loss(n, least)
    total, slack = np.full(len(thresholds), bound), bound
    for p, bad, chance in zip(probability, deviates, chances, strict=True):
        lowest = np.asarray(p, np.float64)
        cap = largest_cap(len(lowest), least, bound)
        order = np.argsort(lowest, kind="stable")
        at = np.searchsorted(lowest[order], thresholds, side="right")
        found = np.cumsum((np.asarray(bad, bool) / chance)[order]) / len(lowest)
        total += np.minimum(np.concatenate([[0.0], found])[at], cap) + (bound - cap)
        slack += bound - cap
    return total / (n + 1), slack / (n + 1)


def largest_loss(episodes: int, propensity: float) -> float:
    """B for so many episodes: so far above 1 that caps cost less than B does, if episodes have :data:`TYPICAL_STEPS` steps."""
    deviation = np.sqrt((1 - propensity) / (propensity * TYPICAL_STEPS))  # of X
    return float(min(1 / propensity, 1 + np.sqrt(2 * np.log(episodes + 1)) * deviation))


@lru_cache(maxsize=4096)
def largest_cap(steps: int, propensity: float, bound: float) -> float:
    """c_T: the largest c with c + E[(X - c)^+] <= ``bound``, for X = Binomial(``steps``, ``propensity``) / (mean)."""
    from scipy.stats import binom

    if propensity >= 1:
        return bound
    counts = np.arange(steps + 1)
    above = binom.sf(counts, steps, propensity)  # P(K > k); the sum of those from k on is E[(K - k)^+]
    atoms = counts / (steps * propensity)
    values = atoms + np.cumsum(above[::-1])[::-1] / (steps * propensity)  # linear between the atoms
    return float(np.interp(bound, values, atoms))
