"""What recorded actions are, by how the state went on: positions, changes or velocities.

Over all episodes, each entry of the action is held against three things that the state of the same entry did: where it was
one step later, by how much it changed, and how fast. How much of the action's variance each of them explains (R², 1 is all
of it) tells the three apart on any robot that follows its commands. It is used to contradict what names or conventions
claim, and to decide where names say nothing at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

READINGS = ("position", "delta", "velocity")
CLAIMS = {
    "joint_position": "position",
    "eef_absolute": "position",
    "joint_delta": "delta",
    "eef_delta": "delta",
    "joint_velocity": "velocity",
}
EXPLAINS = 0.5  # of the variance, in the median entry: a reading that explains this much is the right one
DECIDES = 0.9  # in the median entry and half of it in every one: enough to decide what no name says


@dataclass
class Evidence:
    """Sums over the steps of all episodes; the order of episodes does not matter.

    Args:
        entries: of the action, which are also those of the state.
        control_rate: steps per second.
    """

    entries: Sequence[int]
    control_rate: float
    count: int = 0
    sums: NDArray[np.float64] = field(init=False)  # (2, D): of the action and of its square
    errors: NDArray[np.float64] = field(init=False)  # (3, D): squared, of each reading

    def __post_init__(self) -> None:
        self.sums, self.errors = np.zeros((2, len(self.entries))), np.zeros((3, len(self.entries)))

    def add(self, actions: NDArray[np.float32], states: NDArray[np.float32]) -> None:
        """Take in an episode: actions (T, D) and states (T, S)."""
        entries = list(self.entries)
        a = actions[:-1, entries].astype(np.float64)
        s = states[:, entries].astype(np.float64)
        change = np.diff(s, axis=0)
        self.count += len(a)
        self.sums += a.sum(0), (a**2).sum(0)
        self.errors += [((a - x) ** 2).sum(0) for x in (s[1:], change, change * self.control_rate)]

    def explained(self) -> NDArray[np.float64]:
        """How much of each entry's variance each of :data:`READINGS` explains, (3, M); entries that never move are left
        out."""
        spread = self.sums[1] - self.sums[0] ** 2 / max(self.count, 1)
        moves = spread > 1e-9 * np.maximum(self.sums[1], 1e-12)
        return np.asarray(1 - self.errors[:, moves] / spread[moves])

    def contradicts(self, kind: str) -> str | None:
        """Another reading that explains the actions while that of ``kind`` explains nothing, in words, or None."""
        r2 = self.explained()
        if not r2.shape[1]:
            return None
        median = dict(zip(READINGS, np.median(r2, axis=1), strict=True))
        best = max(median, key=lambda reading: median[reading])
        if median[best] < EXPLAINS or median[CLAIMS[kind]] > 0:
            return None
        return f"the state's {best} one step later explains {100 * median[best]:.0f} % of them, its {CLAIMS[kind]} nothing"

    def shows_positions(self) -> bool:
        """Whether the actions can only be positions: the state follows them in every entry, and nothing else explains them."""
        r2 = self.explained()
        if not r2.shape[1]:
            return False
        median = np.median(r2, axis=1)
        return bool(median[0] > DECIDES and r2[0].min() > DECIDES / 2 and median[1:].max() < EXPLAINS)
