"""A simulator of one's own: a point in the plane that has to reach a goal, as a Gymnasium environment with Box actions.

Registered in a package's pyproject.toml (and installed: pip install -e .), its suite is known by name:

    [project.entry-points."spvla.envs"]
    point = "my_package.point_simulator:PointSimulator"

    python -m data collect --suite point_reach --output runs/point
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import ArrayLike, NDArray

from data.envs.base import RenderMode, SplitPart, Task, task_index
from spvla.actions import ActionSpace, FloatArray
from spvla.errors import InputError
from spvla.observation import MAIN, Observation
from spvla.vlas.base import VLAOutput

SUITE, STATES = "point_reach", 50
GOALS = {"left": (-0.7, 0.5), "right": (0.7, 0.5), "below": (0.0, -0.7)}
SPACE = ActionSpace(
    name="point",
    kind="eef_delta",
    control_rate=10.0,
    q01=(-1.0, -1.0),  # the range of a teacher's actions: the scale of everything learned
    q99=(1.0, 1.0),
    low=(-1.0, -1.0),  # the bounds, as in the Box
    high=(1.0, 1.0),
    translation=(0, 1),
)


class Point(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """The Gymnasium environment, which knows nothing of VLAs."""

    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, goal: tuple[float, float]) -> None:
        self.goal, self.position = np.array(goal), np.zeros(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[NDArray[np.float32], Any]:
        super().reset(seed=seed)
        self.position = self.np_random.uniform(-0.3, 0.3, 2)
        return self.position.astype(np.float32), {}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        self.position = np.clip(self.position + 0.05 * np.clip(action, -1, 1), -1, 1)
        done = bool(np.linalg.norm(self.position - self.goal) < 0.06)
        return self.position.astype(np.float32), float(done), done, False, {"success": done}

    def render(self) -> Any:
        image = np.full((64, 64, 3), 255, np.uint8)
        for place in (*GOALS.values(), tuple(self.position)):
            column, row = int((place[0] + 1) * 31), int((1 - place[1]) * 31)
            colour = (0, 200, 0) if place in GOALS.values() else (200, 0, 0)
            image[max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3] = colour
        return image


@dataclass(frozen=True)
class PointTask(Task):
    """A goal to reach."""

    @property
    def init_states(self) -> int:
        """The seeds 0-49."""
        return STATES


class PointEnv:
    """The same as an :class:`~data.envs.base.Env`."""

    camera, action_space = "camera", SPACE

    def __init__(self, task: Task, render: RenderMode | None) -> None:
        self.task, self.steps, self.success = task, 0, False
        self._env, self._renders = Point(GOALS[task.name]), render is not None

    def reset(
        self, init_state: int | None = None, seed: int = 0, instruction: str | None = None, shuffle: bool = False
    ) -> None:
        if shuffle or instruction not in (None, self.task.instruction):
            raise InputError("point: knows its own instruction alone, and nothing trades places", code="unsupported")
        self._env.reset(seed=seed if init_state is None else init_state)
        self.steps, self.success = 0, False

    def step(self, action: ArrayLike) -> bool:
        *_, info = self._env.step(np.asarray(action, np.float32))
        self.steps, self.success = self.steps + 1, bool(info["success"])
        return self.success  # the step limit is kept by the caller

    def observe(self) -> Observation:
        return Observation({MAIN: self._env.render()} if self._renders else {}, self.state())

    def state(self) -> FloatArray:
        return self._env.position.astype(np.float32)

    def close(self) -> None:
        self._env.close()

    def __enter__(self) -> PointEnv:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class PointExpert:
    """A scripted teacher: a VLA that goes straight to the goal and sees no image."""

    action_space, needs_images = SPACE, False

    def reset(self, instruction: str) -> None:
        self.goal = np.array(GOALS[instruction.split()[-1]])

    def predict(self, observation: Observation, keep_mass: float = 1.0) -> VLAOutput:
        way = (self.goal - observation.state) / 0.05
        return VLAOutput((way / max(1.0, float(np.abs(way).max()))).astype(np.float32)[None])


class PointSimulator:
    """The suite, its environments and its teacher: a :class:`~data.envs.base.Simulator`."""

    action_space, conventions, camera = SPACE, None, "camera"

    def tasks(self, suite: str, tasks: Sequence[int | str] | None = None, max_steps: int | None = None) -> list[Task]:
        names = list(GOALS)
        if suite != SUITE:
            raise InputError(f"unknown suite {suite!r}; known: {SUITE}", code="unknown-suite", field="suite")
        chosen = range(len(names)) if tasks is None else [task_index(suite, names, task) for task in tasks]
        return [PointTask(suite, i, names[i], f"go to {names[i]}", min(max_steps or 60, 60)) for i in chosen]

    def make(self, task: Task, *, render: RenderMode | None = None, cameras: Sequence[str] = (MAIN,)) -> PointEnv:
        return PointEnv(task, render)

    def split(self, facts: Mapping[str, Any]) -> SplitPart | None:
        state = facts.get("init_state")
        return None if state is None else "evaluation" if state >= 30 else "calibration" if state >= 20 else "training"

    def expert(self) -> PointExpert:
        return PointExpert()
