"""Whether a gripper is binary, and what its two ends are: decided on all the episodes of a data set, in any order.

The ends are the two values that most of the steps have, never the smallest and the largest one: a stray code (2.0 among 0
and 1) would become an end, and the gripper that should go to 1 would be sent to 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spvla.statistics import Statistics

NEAR = 0.1  # of the way from one end to the other: this close to an end is that end
MOSTLY = 0.9  # of the steps: two values that so many of them have are codes, more spread ones are measured
FEW_STEPS = 0.01  # of the steps: so many may lie elsewhere in a binary gripper
FEW_CODES = 2  # distinct stray values that may be wrong codes; more of them are a movement
STRAY_STEPS = 0.1  # of the steps may have wrong codes,
STRAY_EPISODES = 0.25  # in at most so many of the episodes


@dataclass(frozen=True)
class GripperValues:
    """What the values of one gripper over all episodes say.

    Args:
        low, high: its ends; equal if it only ever has one value.
        binary: all its values are one of the ends, apart from the ``strays``.
        codes: the ends are exact values, not the middles of measured ones.
        strays: by episode (counted from 0), its most frequent value that is no end, and how many steps are at none.
        passing: the strays of a binary gripper are steps on the way from one end to the other, not wrong codes.
    """

    low: float
    high: float
    binary: bool
    codes: bool
    strays: dict[int, tuple[float, int]]
    passing: bool = False

    def __str__(self) -> str:
        steps = sum(count for _, count in self.strays.values())
        if not steps:
            return f"always {self.low:.6g}" if self.low == self.high else f"{self.low:.6g} and {self.high:.6g}"
        episode, (value, count) = next(iter(self.strays.items()))
        return (
            f"mostly {self.low:.6g} and {self.high:.6g}, but neither at {steps} steps of {len(self.strays)} episodes "
            f"(such as {value:.6g} in episode {episode}, {count} steps)"
        )


def judge_grippers(episodes: Callable[[], Iterator[NDArray[np.float32]]]) -> list[GripperValues]:
    """One :class:`GripperValues` per gripper; the same for any order of the episodes, apart from their numbers.

    Args:
        episodes: called twice; gives the gripper values (T, G) of one episode after the other.
    """
    seen, count = Statistics(), 0
    for values in episodes():
        seen.add(values)
        count += 1
    if not seen.count:
        return []
    judges = [_Judge(*_find_ends(seen, gripper)) for gripper in range(len(seen.min))]
    for number, values in enumerate(episodes()):
        for judge, x in zip(judges, values.T, strict=True):
            judge.add(number, x)
    return [judge.result(seen.count, count) for judge in judges]


def _find_ends(seen: Statistics, gripper: int) -> tuple[float, float, bool]:
    """The two values that most steps have, to within a cell of the histogram, and whether they are codes."""
    values, counts = seen.histogram(gripper)
    if len(values) == 1:
        return float(values[0]), float(values[0]), True
    two = np.sort(np.argsort(-counts, kind="stable")[:2])
    if counts[two].sum() >= MOSTLY * counts.sum():
        return float(values[two[0]]), float(values[two[1]]), True
    low, high = seen.quantile(0.01)[gripper], seen.quantile(0.99)[gripper]
    if low == high:
        low, high = seen.min[gripper], seen.max[gripper]
    return float(low), float(high), False


class _Judge:
    """Collects, for one gripper with given ends, their exact values and the steps that are at neither."""

    def __init__(self, low: float, high: float, codes: bool) -> None:
        self.low, self.high, self.codes = low, high, codes
        self.near = NEAR * (high - low)
        self.exact_low, self.exact_high = np.inf, -np.inf
        self.strays: dict[int, tuple[float, int]] = {}
        self.distinct: set[float] = set()
        self.between = True

    def add(self, number: int, x: NDArray[np.float32]) -> None:
        """Take in the values (T,) of an episode."""
        from_low, from_high = np.abs(x - self.low), np.abs(x - self.high)
        cell_low, cell_high = (abs(self.low) / 1024, abs(self.high) / 1024) if self.codes else (self.near, self.near)
        self.exact_low = min(self.exact_low, float(x.min(initial=np.inf, where=from_low <= cell_low)))
        self.exact_high = max(self.exact_high, float(x.max(initial=-np.inf, where=from_high <= cell_high)))
        off = x[np.minimum(from_low, from_high) > max(self.near, cell_low, cell_high)]
        if len(off):
            found, counts = np.unique(off, return_counts=True)
            self.strays[number] = float(found[counts.argmax()]), len(off)
            self.between &= bool(((found > self.low) & (found < self.high)).all())
            if len(self.distinct) <= FEW_CODES:
                self.distinct |= set(found[: FEW_CODES + 1].tolist())

    def result(self, steps: int, episodes: int) -> GripperValues:
        """The verdict on so many steps of so many episodes."""
        share = sum(count for _, count in self.strays.values()) / steps
        few = episodes > 1 and len(self.strays) <= max(1, STRAY_EPISODES * episodes)
        codes = len(self.distinct) <= FEW_CODES and share <= STRAY_STEPS
        left_out = few and (codes or (share <= FEW_STEPS and not self.between))
        passing = not left_out and share <= FEW_STEPS and self.between
        return GripperValues(
            self.exact_low, self.exact_high, not self.strays or left_out or passing, self.codes, self.strays, passing
        )
