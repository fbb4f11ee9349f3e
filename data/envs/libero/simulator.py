"""LIBERO as a :class:`~data.envs.base.Simulator`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data.envs.base import RenderMode, SplitPart, Task
from data.envs.libero import labels
from data.envs.libero.env import LiberoEnv
from data.envs.libero.expert import Expert
from data.envs.libero.render import CAMERA
from data.envs.libero.tasks import LiberoTask, load_tasks
from spvla.actions import LIBERO, FloatArray
from spvla.observation import MAIN


class Libero:
    """Every suite of LIBERO and LIBERO-PRO that the installed package holds."""

    action_space = LIBERO
    conventions = "libero"
    camera = CAMERA

    def tasks(self, suite: str, tasks: Sequence[int | str] | None = None, max_steps: int | None = None) -> Sequence[LiberoTask]:
        """See :func:`data.envs.libero.tasks.load_tasks`."""
        return load_tasks(suite, tasks, max_steps)

    def make(self, task: Task, *, render: RenderMode | None = None, cameras: Sequence[str] = (MAIN,)) -> LiberoEnv:
        """See :class:`data.envs.libero.env.LiberoEnv`."""
        assert isinstance(task, LiberoTask), "tasks and environments are of one simulator"
        return LiberoEnv(task, render=render, cameras=cameras)

    def split(self, facts: Mapping[str, Any]) -> SplitPart | None:
        """Of the official initial states 30-49 are for evaluation, 20-29 calibrate; seeded resets belong to no part."""
        state = facts.get("init_state")
        if state is None:
            return None
        return "evaluation" if state in range(30, 50) else "calibration" if state in range(20, 30) else "training"

    def image_points(self, states: FloatArray, facts: Mapping[str, Any]) -> FloatArray:
        """See :func:`data.envs.libero.labels.image_points`."""
        return labels.image_points(states, facts.get("scene"))

    def positions(self, states: FloatArray, facts: Mapping[str, Any]) -> FloatArray:
        """See :func:`data.envs.libero.labels.positions`."""
        return labels.positions(states, facts.get("scene"))

    def other_questions(
        self, states: FloatArray, actions: FloatArray, facts: Mapping[str, Any], instruction: str
    ) -> dict[str, tuple[FloatArray, FloatArray, FloatArray]]:
        """See :func:`data.envs.libero.labels.other_questions`."""
        return labels.other_questions(states, actions, facts, instruction)

    def expert(self) -> Expert:
        """See :class:`data.envs.libero.expert.Expert`."""
        return Expert()
