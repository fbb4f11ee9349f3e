"""From an allowed risk to a classifier's threshold: conformal risk control (Angelopoulos et al., arXiv 2208.02814).

Risk is the expected share of an episode's steps that are generated (or kept from an earlier plan) *and* deviate from the
teacher. It never falls as the threshold rises, so for n exchangeable calibration episodes with mean loss R(threshold), the
largest threshold with (n R + 1) / (n + 1) <= risk keeps the expected risk of a new episode below it. Where a coin decided
which generated steps were labelled, :mod:`spvla.gates.audited` has what takes the place of R and 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spvla.errors import InputError
from spvla.fields import check_fields, naming
from spvla.gates.audited import audited_risk

GRID = 512


@dataclass(frozen=True)
class Calibration:
    """A classifier's risk curve.

    Args:
        thresholds: ascending, (M,). A step is intuitive if its probability of deviating is at most the threshold.
        risk: conformal upper bound of the risk at each, non-decreasing.
        coverage: share of steps that are generated at each (mean over episodes); refused proposals are the VLA's steps.
        deviating: share of the generated steps that deviate at each.
        episodes: calibration episodes, the smallest number over the pools that were combined. Of episodes labelled by audits
            it is the number of fully labelled ones that allow as small a risk.
    """

    thresholds: tuple[float, ...]
    risk: tuple[float, ...]
    coverage: tuple[float, ...]
    deviating: tuple[float, ...]
    episodes: int

    def __post_init__(self) -> None:
        check_fields(self, at_least={"episodes": 1})
        if not len(self.thresholds) == len(self.risk) == len(self.coverage) == len(self.deviating) > 0:
            raise InputError("thresholds, risk, coverage and deviating must have the same length")
        for name in ("thresholds", "risk"):
            if (np.diff(getattr(self, name)) < 0).any():
                raise InputError(f"{name} must not decrease")

    @property
    def smallest_risk(self) -> float:
        """The smallest risk that this many episodes can guarantee: 1 / (n + 1)."""
        return 1.0 / (self.episodes + 1)

    def threshold(self, risk: float) -> float:
        """The largest threshold whose bound is at most ``risk``; negative (nothing is intuitive) if even the lowest
        is above it. Raises :class:`InputError` for a risk that needs more calibration episodes."""
        if not 0 < risk <= 1:
            raise InputError(f"risk must lie in (0, 1], got {risk}")
        if risk < self.smallest_risk:
            raise InputError(
                f"risk {risk:g} is too small for {self.episodes} calibration episodes: "
                f"the smallest possible is {self.smallest_risk:.4f}"
            )
        allowed = self._allowed(risk)
        return self.thresholds[allowed - 1] if allowed else -1.0

    def coverage_at(self, risk: float) -> float:
        """Share of steps that are generated at the largest threshold whose bound is at most ``risk``, mean over episodes."""
        allowed = self._allowed(risk)
        return self.coverage[allowed - 1] if allowed else 0.0

    def _allowed(self, risk: float) -> int:
        """How many of the ascending thresholds have a bound of at most ``risk``."""
        return int(np.searchsorted(self.risk, risk, side="right"))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "calibration") -> Calibration:
        """Read :meth:`to_dict`'s form; an :class:`InputError` names ``where`` if it is not that."""
        with naming(where):
            return cls(**values)


def calibrate(
    probability: Sequence[ArrayLike],
    deviates: Sequence[ArrayLike],
    thresholds: NDArray[np.float64] | None = None,
    propensities: Sequence[ArrayLike] | None = None,
) -> Calibration:
    """The risk curve of a classifier over calibration episodes.

    Args:
        probability: per episode, the classifier's probability of deviating at each step, (T_i,); infinity where the VLA acts
            whatever the threshold: at the first step, in an unfamiliar state, where the proposal is refused.
        deviates: per episode, whether the proposal deviated from the teacher, (T_i,); False where the teacher did not say.
        thresholds: where to evaluate the curve; by default quantiles of the probabilities.
        propensities: per episode, the probability with which the teacher was to say at each step, (T_i,); None: it always did.
    """
    n = len(probability)
    if n == 0:
        raise InputError("calibration: no episodes")
    p = np.concatenate([np.asarray(x, np.float64) for x in probability])
    bad = np.concatenate([np.asarray(x, bool) for x in deviates])
    weight = np.concatenate([np.full(len(np.asarray(x)), 1.0 / (n * len(np.asarray(x)))) for x in probability])
    if np.isnan(p).any():
        raise InputError("calibration: the classifier returned NaN")
    if thresholds is None:
        thresholds = quantile_grid(probability)
    order = np.argsort(p, kind="stable")
    at = np.searchsorted(p[order], thresholds, side="right")  # steps with p <= threshold

    def up_to(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.concatenate([[0.0], np.cumsum(values[order])])[at]

    loss, coverage = up_to(weight * bad), up_to(weight)
    risk, episodes, stands_for = (n * loss + 1) / (n + 1), n, np.ones_like(p)
    if propensities is not None:
        risk, smallest = audited_risk(probability, deviates, propensities, thresholds)
        episodes = max(1, int(1 / smallest - 1 + 1e-9))
        stands_for = 1 / np.concatenate([np.asarray(x, np.float64) for x in propensities])
    count, wrong = up_to(np.ones_like(p)), up_to(stands_for * bad)
    return Calibration(
        thresholds=tuple(thresholds.tolist()),
        risk=tuple(risk.tolist()),
        coverage=tuple(coverage.tolist()),
        deviating=tuple((wrong / np.maximum(count, 1)).tolist()),
        episodes=episodes,
    )


def quantile_grid(probability: Sequence[ArrayLike]) -> NDArray[np.float64]:
    """Thresholds at which a curve is evaluated: quantiles of the finite probabilities of some episodes, ascending; a single
    zero where there are none."""
    p = np.concatenate([np.asarray(x, np.float64) for x in probability])
    finite = p[np.isfinite(p)]
    return np.unique(np.quantile(finite, np.linspace(0, 1, GRID))) if len(finite) else np.zeros(1)


def worst_of(curves: Sequence[Calibration]) -> Calibration:
    """One curve for several pools of episodes (teacher rollouts, accelerated rollouts): the largest risk at every
    threshold, so that the bound holds in each pool. All must share their thresholds; coverage is the first pool's."""
    first = curves[0]
    if any(c.thresholds != first.thresholds for c in curves):
        raise InputError("calibration: pools were evaluated at different thresholds")
    return Calibration(
        thresholds=first.thresholds,
        risk=tuple(np.max([c.risk for c in curves], axis=0).tolist()),
        coverage=first.coverage,
        deviating=tuple(np.max([c.deviating for c in curves], axis=0).tolist()),
        episodes=min(c.episodes for c in curves),
    )
