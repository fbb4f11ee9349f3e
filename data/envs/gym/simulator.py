"""Any Gymnasium environment as a :class:`~data.envs.base.Simulator`: its suite is a YAML file."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.envs.base import RenderMode, SplitPart, Task, task_index
from data.envs.gym.description import Description
from data.envs.gym.env import CAMERA, INIT_STATES, GymEnv, GymTask
from data.envs.gym.guesses import Known, look_at
from spvla.actions import ActionSpace
from spvla.errors import InputError
from spvla.fields import naming
from spvla.observation import MAIN
from spvla.vlas.base import VLA
from spvla.vlas.registry import load_vla


class Gym:
    """The simulator ``gym``, a :class:`~data.envs.base.Simulator`.

    Args:
        file: the YAML file that describes the environment; None: a recorded suite ``gym_NAME``, of which nothing but its split
            is known.
    """

    conventions = None
    camera = CAMERA

    def __init__(self, file: str | None = None) -> None:
        self.file = file
        self._told = False
        if file is not None:
            self.description = Description.read(Path(file))
            folder = str(Path(file).resolve().parent)
            if folder not in sys.path:  # environments and teachers may lie beside the file
                sys.path.append(folder)

    @functools.cached_property
    def _known(self) -> Known:
        if self.file is None:
            told = "suite: a suite of the simulator gym is given by its file, as in --suite my_env.yaml"
            raise InputError(told, code="unknown-suite", field="suite")
        with naming(self.file):
            return look_at(self.description, self.description.env)

    @property
    def action_space(self) -> ActionSpace:
        """Of all its tasks."""
        return self._known.space

    @property
    def stamp(self) -> str:
        """See :class:`data.envs.base.Described`."""
        return self.description.stamp

    def tasks(self, suite: str, tasks: Sequence[int | str] | None = None, max_steps: int | None = None) -> list[Task]:
        """See :meth:`data.envs.base.Simulator.tasks`. What was read from the environment is printed the first time."""
        known, out = self._known, list[Task]()
        description, names = known.description, list(known.description.tasks)
        for note in () if self._told else known.notes:
            print(f"{self.file}: {note}")
        self._told = True
        if max_steps is not None and max_steps < 1:
            raise InputError(f"max_steps must be at least 1, got {max_steps}", field="max_steps")
        for i in range(len(names)) if tasks is None else [task_index(suite, names, task) for task in tasks]:
            variant = description.variant(names[i])
            text = names[i].replace("_", " ").replace("-", " ") if variant.instruction is None else variant.instruction
            assert variant.max_steps is not None, "completed"
            limit = min(max_steps or variant.max_steps, variant.max_steps)
            where = f"{self.file}: task {names[i]}"
            out.append(GymTask(description.suite, i, names[i], text, limit, description, known.space, where))
        return out

    def make(self, task: Task, *, render: RenderMode | None = None, cameras: Sequence[str] = (MAIN,)) -> GymEnv:
        """See :class:`~data.envs.gym.env.GymEnv`."""
        assert isinstance(task, GymTask), "tasks and environments are of one simulator"
        return GymEnv(task, render, cameras)

    def split(self, facts: Mapping[str, Any]) -> SplitPart | None:
        """Initial states 0-19 train, 20-29 calibrate, 30-49 are for evaluation; other seeds belong to no part."""
        state = facts.get("init_state")
        if not isinstance(state, int) or state not in range(INIT_STATES):
            return None
        return "evaluation" if state >= 30 else "calibration" if state >= 20 else "training"

    def expert(self) -> VLA:
        """The file's ``teacher``. Raises :class:`InputError`: it names none, or one with other actions."""
        teacher = None if self.file is None else self.description.teacher
        if teacher is None:
            told = f"{self.file}: names no teacher; add teacher: my_module:load, or choose another policy with --vla"
            raise InputError(told, code="missing-field", field="teacher")
        vla = load_vla(teacher, None, self.description.teacher_options, self.file)
        self.action_space.require_compatible(vla.action_space, f"{self.file}: teacher {teacher}")
        return vla
