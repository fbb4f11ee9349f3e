"""DAgger (arXiv 1011.0686): a student acts, the teacher labels every state it visits, and helps where it gets stuck.

Helping keeps episodes near the states that matter, so that labels cover the whole task from the start. The
student's weights are read anew for each episode: a trainer that writes them and a collector that runs this work side by
side, with nothing between them but a folder.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np

from spvla.actions import ActionSpace, FloatArray
from spvla.errors import InputError
from spvla.observation import Observation
from spvla.vlas.base import VLA
from spvla.vlas.registry import load_vla

STALL_STEPS, STALL_DISTANCE = 15, 0.012  # a hand that moves less than this many metres in so many steps is stuck
ASTRAY_STEPS, ASTRAY = 8, 0.6  # more than this off the teacher's translation, normalised, for so many steps is going astray
HELP_STEPS = (8, 30)  # how long the teacher then acts
HEAD_STEPS = 70  # most steps that the teacher acts at an episode's beginning ...
HEAD_SHARE = 0.4  # ... in this share of the episodes
PATIENCE = 110  # steps after which the teacher finishes the task


class Student:
    """A :class:`data.rollout.Driver`: the student acts, and now and then the teacher in its place. Of its plans more or
    fewer actions are executed, so that the states of every horizon are visited.

    Args:
        policy, checkpoint: see :func:`spvla.vlas.registry.load_vla`.
        space: the teacher's action space; the student's must agree.
    """

    def __init__(self, policy: str, checkpoint: str | None, space: ActionSpace) -> None:
        self.policy, self.checkpoint, self.space = policy, checkpoint, space
        self._student: VLA | None = None
        self._stamp: tuple[int, int] | None = None
        self.helped = 0

    def start(self, instruction: str, seed: int) -> None:
        """Begin an episode with the newest weights."""
        self._student = self._newest()
        self._student.reset(instruction)
        self._rng = np.random.default_rng([seed, 2])
        self.helped = self._astray = 0
        self._path: list[FloatArray] = []
        self._plan: deque[FloatArray] = deque()
        head = self._rng.random() < HEAD_SHARE
        self._help_until = int(self._rng.integers(1, HEAD_STEPS)) if head else 0

    def drive(self, observe: Callable[[], Observation], label: FloatArray, step: int) -> FloatArray:
        """The student's action (D,), or the teacher's ``label`` while it helps."""
        assert self._student is not None
        observation = observe()
        assert observation.state is not None
        self._path.append(observation.state[:3])  # where the hand is
        recent = np.array(self._path[-STALL_STEPS:])
        if step >= self._help_until and len(self._path) >= STALL_STEPS and np.ptp(recent, axis=0).max() < STALL_DISTANCE:
            self._help_until = step + int(self._rng.integers(*HELP_STEPS))
            self._path.clear()
        if step < self._help_until or step >= PATIENCE:
            self.helped += 1
            self._plan.clear()
            return label
        if not self._plan:
            actions = self._student.predict(observation).actions
            self._plan.extend(actions[: self._rng.integers(1, len(actions), endpoint=True)] if len(actions) > 1 else actions)
        action = self.space.clip(self._plan.popleft())
        dims = list(self.space.translation or self.space.continuous)
        off = np.abs(self.space.normalize(action) - self.space.normalize(label))[dims].max()
        self._astray = self._astray + 1 if off > ASTRAY else 0
        if self._astray >= ASTRAY_STEPS:
            self._help_until = step + int(self._rng.integers(*HELP_STEPS))
            self._astray = 0
        return action

    def _newest(self) -> VLA:
        """The student, read again if its weights on disk are not those in memory."""
        weights = None if self.checkpoint is None else Path(self.checkpoint) / "model.safetensors"
        while True:
            stamp = _stamp(weights)
            if self._student is not None and stamp == self._stamp:
                return self._student
            student = load_vla(self.policy, self.checkpoint)
            if stamp == _stamp(weights):  # else they were replaced while they were read
                break
        self.space.require_compatible(student.action_space, f"student {self.policy!r}")
        self._stamp = stamp
        return student


def _stamp(path: Path | None) -> tuple[int, int] | None:
    """Modification time and inode of a file, None if there is none to watch."""
    if path is None:
        return None
    try:
        status = path.stat()
    except FileNotFoundError:
        raise InputError(f"{path}: missing; a student's checkpoint is a folder with model.safetensors") from None
    return status.st_mtime_ns, status.st_ino
