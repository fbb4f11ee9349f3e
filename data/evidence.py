"""What recorded numbers say of themselves, over all episodes: positions, changes or velocities; angles that were wrapped.

Each entry of the action is held against three things that the state of the same entry did: where it was
one step later, by how much it changed, and how fast. How much of the action's variance each of them explains (R², 1 is all
of it) tells the three apart on any robot that follows its commands. It is used to contradict what names or conventions
claim, and to decide where names say nothing at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spvla.actions import ActionSpace
from spvla.gripper import NEAR
from spvla.store import read_action_space
from spvla.store.columns import read_parquet, read_vectors

READINGS = ("position", "delta", "velocity")
CLAIMS = {
    "joint_position": "position",
    "eef_absolute": "position",
    "joint_delta": "delta",
    "eef_delta": "delta",
    "joint_velocity": "velocity",
}
EXPLAINS = 0.5  # of the variance, in the median entry: a reading that explains this much is the right one
TURNS = {"2 pi": 2 * np.pi, "360 degrees": 360.0}
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
        """Another reading that explains the actions while that of ``kind`` does not, in words, or None."""
        r2 = self.explained()
        if not r2.shape[1]:
            return None
        median = dict(zip(READINGS, np.median(r2, axis=1), strict=True))
        best = max(median, key=lambda reading: median[reading])
        if median[best] < EXPLAINS or median[CLAIMS[kind]] > EXPLAINS / 2:
            return None
        r2_best, r2_claimed = 100 * median[best], 100 * max(median[CLAIMS[kind]], 0)
        return f"the state's {best} explains {r2_best:.0f} % of their variance, its {CLAIMS[kind]} only {r2_claimed:.0f} %"

    def shows_positions(self) -> bool:
        """Whether the actions can only be positions: the state follows them in every entry, and nothing else explains them."""
        r2 = self.explained()
        if not r2.shape[1]:
            return False
        median = np.median(r2, axis=1)
        return bool(median[0] > DECIDES and r2[0].min() > DECIDES / 2 and median[1:].max() < EXPLAINS)


@dataclass
class WholeTurns:
    """Finds angles that are recorded within one turn, and so jump by a whole one where the robot barely moved.

    Args:
        width: how many entries there are.

    Attributes:
        count: jumps by (almost) a whole turn, (turns, D).
        first: the first episode with one, (turns, D); -1 without.
    """

    width: int
    count: NDArray[np.int64] = field(init=False)
    first: NDArray[np.int64] = field(init=False)
    low: NDArray[np.float64] = field(init=False)
    high: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        self.count = np.zeros((len(TURNS), self.width), np.int64)
        self.first = np.full((len(TURNS), self.width), -1)
        self.low, self.high = np.full(self.width, np.inf), np.full(self.width, -np.inf)

    def add(self, number: int, values: NDArray[np.float32], changes: bool = False) -> None:
        """Take in the values (T, D) of episode ``number``; ``changes``: they are differences already."""
        steps = np.abs(values if changes else np.diff(values, axis=0))
        self.low, self.high = np.fmin(self.low, values.min(0)), np.fmax(self.high, values.max(0))
        for k, turn in enumerate(TURNS.values()):
            found = ((steps >= 0.9 * turn) & (steps <= 1.02 * turn)).sum(0)
            self.first[k] = np.where((self.first[k] < 0) & (found > 0), number, self.first[k])
            self.count[k] += found

    def found(self, changes: bool = False) -> Iterator[tuple[int, str, int, int]]:
        """Entry, turn in words, number of jumps and first episode with one. An entry that goes further than one turn, such as
        a position in millimetres, is no such angle."""
        for k, (words, turn) in enumerate(TURNS.items()):
            fits = self.high - self.low <= (2.04 if changes else 1.02) * turn
            for entry in np.flatnonzero((self.count[k] > 0) & fits):
                yield int(entry), words, int(self.count[k, entry]), int(self.first[k, entry])


@dataclass
class OffEnds:
    """Counts the steps at which a binary gripper of ``space`` is at neither of its ends."""

    space: ActionSpace
    found: dict[int, tuple[int, int, float]] = field(default_factory=dict)  # entry: steps; episode and value of the first one

    def add(self, number: int, actions: NDArray[np.float32]) -> None:
        """Take in the actions (T, D) of episode ``number``."""
        for d in self.space.gripper if self.space.binary_gripper else ():
            values, low, high = actions[:, d], self.space.q01[d], self.space.q99[d]
            off = values[np.minimum(np.abs(values - low), np.abs(values - high)) > max(NEAR * (high - low), 1e-3 * abs(high))]
            if len(off):
                count, first, value = self.found.get(d, (0, number, float(off[0])))
                self.found[d] = count + len(off), first, value

    def notes(self, where: str) -> Iterator[str]:
        """What was found, a line for each gripper."""
        for d, (count, first, value) in self.found.items():
            ends = f"{self.space.q01[d]:g} and {self.space.q99[d]:g}"
            yield (
                f"{where}: the binary gripper (action entry {d}) is at neither of its ends, {ends}, for {count} steps, first "
                f"in episode {first} at {value:g}; they count as the nearer end"
            )


def contradictions(store: Path) -> list[str]:
    """What in the numbers of a finalised store contradicts its action space, a line each."""
    space = read_action_space(store)
    changes = space.kind not in ("eef_absolute", "joint_position")
    comparable = [d for d in space.continuous if space.role(d) != "rotation" and (d in space.moving) == changes]
    evidence: Evidence | None = None
    ends = OffEnds(space)
    turns: dict[str, WholeTurns] = {}
    for number, actions, states in _episodes(store):
        if states is not None and evidence is None:
            evidence = Evidence([d for d in comparable if d < states.shape[1]], space.control_rate)
        if states is not None and evidence is not None:
            evidence.add(actions, states)
        ends.add(number, actions)
        for name, values in (("action", actions), ("observation.state", states)):
            if values is not None and (name, space.kind) != ("action", "joint_velocity"):
                turns.setdefault(name, WholeTurns(values.shape[1])).add(number, values, changes and name == "action")
    out = []
    if evidence is not None and (told := evidence.contradicts(space.kind)) is not None:
        out.append(f"{store}: its actions are taken as {space.kind}, but {told}; is that the right kind?")
    out += ends.notes(str(store))
    for name, found in turns.items():
        out += _tell_turns(f"{store}: {name}", found, space if name == "action" else None, changes and name == "action")
    return out


def _tell_turns(where: str, turns: WholeTurns, space: ActionSpace | None, changes: bool) -> Iterator[str]:
    for entry, words, count, first in turns.found(changes):
        role = "joint" if space is None else space.role(entry)
        if role not in ("rotation", "joint"):
            continue
        what = "is a whole turn" if changes else "jumps by a whole turn"
        yield (
            f"{where} entry {entry} {what} ({words}) {count} times, first in episode {first}: an angle that is recorded within "
            "one turn; its scale and largest jump are those of the number, not of the motion"
        )


def _episodes(store: Path) -> Iterator[tuple[int, NDArray[np.float32], NDArray[np.float32] | None]]:
    """Number, actions (T, D) and states (T, S) of each episode of a finalised store."""
    for file in sorted((store / "data").glob("*/*.parquet")):
        table = read_parquet(file, ["action", "observation.state", "episode_index"])
        actions = read_vectors(table, "action", str(file))
        states = read_vectors(table, "observation.state", str(file)) if "observation.state" in table.column_names else None
        numbers = table["episode_index"].to_numpy()
        edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
        for a, b in pairwise(edges):
            yield int(numbers[a]), actions[a:b], None if states is None else states[a:b]
