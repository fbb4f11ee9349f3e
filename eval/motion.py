"""How an episode's motion feels: the way of the hand, its jerk, gripper reversals, and jumps where VLA and generator change.

Positions are what is differentiated, whatever an action is:

* *measured*: the hand's position in the proprioceptive state, metres, where the simulator says which values that is
  (:class:`data.envs.base.HandTracking`). There is one per step, taken before the action.
* *commanded*: where the actions alone would lead, in their own units. A target is a position. A change per step is summed up. A
  velocity is summed up and divided by the control rate. So the jerk of a command that is a change is its *second* difference
  times the rate cubed, that of a velocity its second difference times the rate squared.

Jerk is the third difference of positions times the control rate cubed: metres, or units of the action, per second cubed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spvla.actions import ActionSpace
from spvla.history import Source
from spvla.store import Episode

Positions = NDArray[np.float64]
MOTION = (
    *("path_metres", "commanded_path", "squared_jerk", "commanded_squared_jerk"),
    *("gripper_reversals", "hand_over_jump"),
)


def motion(episode: Episode, space: ActionSpace, hand: Sequence[int] | None) -> dict[str, float | None]:
    """The columns :data:`MOTION` of an episode; None for what its robot does not tell.

    Args:
        episode: as executed, with its sources.
        space: of its actions.
        hand: which values of its states are the hand's position, metres; None if nothing says so.

    Returns:
        ``path_metres``: length of the hand's measured way, m. ``commanded_path``: of its commanded way, in the units of the
        action's translation. ``squared_jerk``: mean square of the hand's measured jerk, (m/s^3)^2.
        ``commanded_squared_jerk``: of the commanded jerk of the translation, or of all joints where an action has none,
        (unit/s^3)^2. ``gripper_reversals``: see :func:`reversals`. ``hand_over_jump``: see :func:`hand_over_jump`.
    """
    measured = None if hand is None or episode.states is None else episode.states[:, list(hand)]
    way = commanded(episode.actions, space, space.translation)
    led = commanded(episode.actions, space, space.translation or space.continuous)
    return {
        "path_metres": path_length(measured),
        "commanded_path": path_length(way),
        "squared_jerk": squared_jerk(measured, space.control_rate),
        "commanded_squared_jerk": squared_jerk(led, space.control_rate),
        "gripper_reversals": reversals(episode.actions, space),
        "hand_over_jump": hand_over_jump(episode.actions, episode.sources, space),
    }


def commanded(actions: ArrayLike, space: ActionSpace, dims: Sequence[int]) -> Positions | None:
    """Where the dimensions ``dims`` of actions (T, D) lead, environment units: the targets (T, n), or (T + 1, n) from 0 on
    where the actions are changes or velocities. None without dimensions, or if it is unknown what they are: a mixture, or
    ``motions`` beside absolute targets, which may be either."""
    a = np.asarray(actions, np.float64)[:, list(dims)]
    moving = set(dims) & set(space.moving)
    if not dims or not len(a) or 0 < len(moving) < len(dims):
        return None
    if not moving:
        return a
    if space.kind in ("eef_absolute", "joint_position"):
        return None
    way = np.concatenate([np.zeros((1, len(dims))), np.cumsum(a, axis=0)])
    return way / space.control_rate if space.kind == "joint_velocity" else way


def path_length(positions: ArrayLike | None) -> float | None:
    """Length of the way through positions (T, n); None without two of them, or if one is unknown."""
    if (x := _known(positions, 2)) is None:
        return None
    return float(np.linalg.norm(np.diff(x, axis=0), axis=1).sum())


def squared_jerk(positions: ArrayLike | None, rate: float) -> float | None:
    """Mean over time of the squared length of the jerk, (unit/s^3)^2, of positions (T, n) at ``rate`` (Hz); None without four
    of them, or if one is unknown."""
    if (x := _known(positions, 4)) is None:
        return None
    jerk = np.diff(x, 3, axis=0) * rate**3
    return float((jerk**2).sum(axis=1).mean())


def reversals(actions: ArrayLike, space: ActionSpace) -> int | None:
    """How often the gripper is commanded to the other side of the middle of its range, or of zero where its command is a change
    or a velocity (zero itself reverses nothing). Of all grippers together; None without one."""
    if not space.gripper:
        return None
    a = np.asarray(actions, np.float64)
    still = set(space.gripper) & set(space.moving)
    sides = [np.sign(a[:, d]) if d in still else np.where(space.normalize(a)[:, d] >= 0, 1, -1) for d in space.gripper]
    return sum(int(np.count_nonzero(np.diff(side[side != 0]))) for side in sides)


def hand_over_jump(actions: ArrayLike, sources: ArrayLike | None, space: ActionSpace) -> float | None:
    """Largest absolute difference of consecutive actions (T, D) over all dimensions but the gripper's, normalised units, where
    the generator (``sources`` (T,)) takes over or gives back. Steps on which the robot waits for the VLA are the VLA's. None
    where nobody hands over."""
    if sources is None or not space.continuous:
        return None
    generated = np.asarray(sources) == Source.GENERATOR
    changes = generated[1:] != generated[:-1]
    if not changes.any():
        return None
    jumps = np.abs(np.diff(space.normalize(actions)[:, list(space.continuous)], axis=0))
    return float(jumps[changes].max())


def motion_means(episodes: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Means of :data:`MOTION` over the episodes (rows) that have them, and ``seconds_to_success``, the mean length of the
    successful ones; None where no episode has one."""
    known = {name: [e[name] for e in episodes if e.get(name) is not None] for name in MOTION}
    known["seconds_to_success"] = [e["seconds"] for e in episodes if e["success"] and "seconds" in e]
    return {name: float(np.mean(values)) if values else None for name, values in known.items()}


def _known(positions: ArrayLike | None, least: int) -> Positions | None:
    """Positions (T, n) as float64, None if they are fewer than ``least``, of no dimension or not all finite."""
    if positions is None:
        return None
    x = np.asarray(positions, np.float64)
    return x if len(x) >= least and x.shape[1] and np.isfinite(x).all() else None
