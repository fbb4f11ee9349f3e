"""A scripted teacher for ``fetch.yaml``: a stateless function of the environment's own observation, which no robot has.

It stands where a VLA would: ``--vla my_package:load`` puts one there that looks at the images instead.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data.envs import simulator
from data.envs.gym.env import GymObservation
from spvla.actions import ActionSpace
from spvla.errors import InputError
from spvla.observation import Observation
from spvla.vlas.base import VLAOutput

Vector = NDArray[np.float64]

GAIN, FASTEST = 8.0, 0.5  # of the action, which moves 5 cm, per metre of error; and at most
ABOVE = 0.07  # metres over the block on the way
OPEN, CLOSED = 1.0, -1.0
GRIPPED = 0.028  # a finger's opening that holds the block
BEHIND = 0.065  # metres from the block's middle to where a push starts


class FetchTeacher:
    """Picks or pushes the block, as the instruction says."""

    needs_images = False

    def __init__(self, space: ActionSpace) -> None:
        self.action_space = space
        self._pushes = False

    def reset(self, instruction: str) -> None:
        """Start an episode."""
        self._pushes = instruction.startswith("push")

    def predict(self, observation: Observation, keep_mass: float = 1.0) -> VLAOutput:
        """One action (1, 4). Raises :class:`InputError` without the environment's own observation."""
        if not isinstance(observation, GymObservation):
            raise InputError("the Fetch teacher reads the block's pose: it needs a GymObservation")
        values = np.asarray(observation.obs["observation"], np.float64)
        hand, block, fingers = values[:3], values[3:6], float(values[9:11].mean())
        goal = np.asarray(observation.obs["desired_goal"], np.float64)
        target, gripper = _push(hand, block, goal) if self._pushes else _pick(hand, block, goal, fingers)
        way = np.clip(GAIN * (target - hand), -FASTEST, FASTEST)
        return VLAOutput(np.array([[*way, gripper]], np.float32))


def load(checkpoint: str | None, suite: str) -> FetchTeacher:
    """The teacher, in the action space that the file describes."""
    return FetchTeacher(simulator(suite).action_space)


def _pick(hand: Vector, block: Vector, goal: Vector, fingers: float) -> tuple[Vector, float]:
    """Where the hand goes to bring the block to the goal, and the gripper's command."""
    off = float(np.linalg.norm((block - hand)[:2]))
    around = off < 0.02 and abs(block[2] - hand[2]) < 0.015
    if around and fingers < GRIPPED:
        return goal - block + hand, CLOSED
    if around:
        return block, CLOSED
    return block + np.array([0.0, 0.0, min(ABOVE, 3.0 * max(off - 0.01, 0.0))]), OPEN


def _push(hand: Vector, block: Vector, goal: Vector) -> tuple[Vector, float]:
    """Where the hand goes to push the block to the goal: behind it, then through it."""
    way = (goal - block)[:2]
    along = way / max(float(np.linalg.norm(way)), 1e-6)
    from_block = (hand - block)[:2]
    aside = float(abs(from_block[0] * along[1] - from_block[1] * along[0]))
    behind = float(-from_block @ along)
    if behind > 0.02 and aside < 0.015 and hand[2] < block[2] + 0.02:
        return np.array([*(hand[:2] + way - 2.0 * (from_block + behind * along)), block[2]]), CLOSED
    start = block[:2] - BEHIND * along
    off = float(np.linalg.norm(start - hand[:2]))
    return np.array([*start, block[2] + min(ABOVE, 3.0 * max(off - 0.01, 0.0))]), CLOSED
