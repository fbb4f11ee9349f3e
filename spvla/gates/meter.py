"""How much of what the generator did has deviated so far, judged by audits alone, at any time one cares to look.

A step *loses* if the generator was allowed to act and its proposal deviates from the VLA's answer. Every such step is audited
with the same probability p, by a coin that knows nothing of the answer, so each loss is found with probability p,
independently of all others: after N losses the number K of found ones is Binomial(N, p), in whatever order and for whatever
reasons the losses come. K is known, N is not. For any q < p the likelihood ratio

    M_N = (q / p)^K ((1 - q) / (1 - p))^(N - K)

is a martingale from loss to loss that starts at 1, and so is a mixture over q. By Ville's inequality it ever reaches 20 with
probability at most 1/20. So with a probability of 95 %, N is *at all times* below the smallest number of losses at which the
mixture reaches 20: the bound may be looked at after every step, and a deployment may be stopped because of it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

_J = np.arange(14)
_FRACTIONS = 1.0 - 2.0 ** (-_J / 2)  # q / p: coarse ones tell soon, those near 1 tell sharply in the long run
_LOG_WEIGHTS = np.log(1.0 / ((_J + 1) * (_J + 2)))  # they sum to less than 1
RUN_LENGTH = 10_000  # steps between two false alarms, at least on average
ENOUGH = 20.0  # evidence that most of what is generated is wrong


@lru_cache(maxsize=4096)
def losses_bound(found: int, audit: float, error: float = 0.05) -> int:
    """The largest number of losses that ``found`` ones leave possible; the true number is above it at any time, ever, with
    probability at most ``error``.

    Args:
        found: losses that audits have found (K).
        audit: probability of an audit (p), in (0, 1].
        error: probability that the bound ever fails.
    """
    if audit >= 1:
        return found
    q = audit * _FRACTIONS
    with np.errstate(divide="ignore", invalid="ignore"):
        gone = np.where(found == 0, 0.0, found * np.log(_FRACTIONS))
    fixed, per_miss = _LOG_WEIGHTS + gone, np.log1p(-q) - np.log1p(-audit)

    def possible(missed: int) -> bool:
        return float(np.logaddexp.reduce(fixed + missed * per_miss)) < -np.log(error)

    low, high = 0, 1
    while possible(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if possible(middle) else (low, middle)
    return found + low


class DriftAlarm:
    """Says that the generator deviates more often than allowed: an e-detector (Shin, Ramdas, Rinaldo, arXiv 2203.03532).

    Evidence is multiplied at every step by 1 + 3 p (h - a), which is at most 1 on average while the risk is at most a, and
    never falls below 1. An alarm comes when it reaches :data:`RUN_LENGTH`: where the risk holds that takes at least so
    many steps on average. Three times p is the factor that finds four times the allowed risk soonest.
    """

    def __init__(self, allowed: float, audit: float) -> None:
        self.allowed = allowed
        self.bet = 3 * audit

    def advance(self, evidence: float, estimate: float) -> tuple[float, bool]:
        """The evidence after a step with the loss's unbiased ``estimate`` (h), and whether it is an alarm; one that was
        raised begins anew."""
        evidence = max(1.0, evidence) * (1 + self.bet * (estimate - self.allowed))
        return (1.0, True) if evidence >= RUN_LENGTH else (evidence, False)


def mostly_wrong(evidence: float, deviates: bool) -> tuple[float, bool]:
    """The evidence, after an audit, that more than half of what is generated deviates, and whether it is enough: then
    generating is worth nothing, whatever the risk allows.

    It is multiplied by 1.5 where the audited proposal deviates and by 0.5 where it does not, and never falls below 1. While at
    most half deviate, it takes :data:`ENOUGH` audits until it is enough by mistake, at least on average; where nearly all
    do, about ten.
    """
    evidence = max(1.0, evidence) * (1.5 if deviates else 0.5)
    return (1.0, True) if evidence >= ENOUGH else (evidence, False)
