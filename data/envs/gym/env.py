"""A Gymnasium environment as an :class:`~data.envs.base.Env`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data.envs.base import RenderMode, Task
from data.envs.gym.description import Description, Success
from data.envs.gym.guesses import picture_at, require_same_box, state_of
from data.envs.gym.made import make
from data.envs.gym.places import RENDER
from spvla.actions import ActionSpace, FloatArray
from spvla.errors import InputError
from spvla.observation import MAIN, Observation

INIT_STATES = 50
CAMERA = "camera"  # what recordings call the main one


@dataclass(frozen=True)
class GymTask(Task):
    """One task of a file.

    Args:
        description: completed by looking at the environment.
        space: of its actions.
        where: the file, for errors.
    """

    description: Description = field(repr=False, compare=False)
    space: ActionSpace = field(repr=False, compare=False)
    where: str = field(compare=False)

    @property
    def init_states(self) -> int:
        """The seeds 0-49 of the environment's reset."""
        return INIT_STATES


@dataclass(frozen=True)
class GymObservation(Observation):
    """An observation with what the environment itself returned, for scripted teachers.

    Args:
        obs: its observation, of any form: goals, objects, everything.
        info: its info.
    """

    obs: Any = field(kw_only=True)
    info: Mapping[Any, Any] = field(kw_only=True)


class GymEnv:
    """One task's simulation, an :class:`~data.envs.base.Env`. Initial state i is the one that the environment draws with the
    seed i."""

    camera = CAMERA

    def __init__(self, task: GymTask, render: RenderMode | None = None, cameras: Sequence[str] = (MAIN,)) -> None:
        description, pictures = task.description, task.description.pictures
        self.task, self.action_space = task, task.space
        self.steps, self.success = 0, False
        if render is not None:
            for camera in (c for c in cameras if c not in pictures):
                known = ", ".join(pictures) or "none"
                raise InputError(
                    f"{task.where}: camera {camera!r} has no place; there is: {known}", code="unknown-camera", field="cameras"
                )
        self._pictures = {} if render is None else {camera: pictures[camera] for camera in cameras}
        variant = description.variant(task.name)
        self._options = variant.options
        self._made = make(description, variant, task.where, draws=RENDER in self._pictures.values())
        require_same_box(self._made, task.space, description)
        if description.hand_position:  # an ability that it otherwise lacks, see HandTracking
            self.hand_position = description.hand_position
        self._state = np.zeros(0, np.float32)

    def reset(
        self, init_state: int | None = None, seed: int = 0, instruction: str | None = None, shuffle: bool = False
    ) -> None:
        """See :meth:`data.envs.base.Env.reset`; only the task's own instruction can be given, and nothing trades places."""
        if init_state is not None and not 0 <= init_state < INIT_STATES:
            raise InputError(f"{self.task.name} has initial states 0-{INIT_STATES - 1}, got {init_state}", field="init_states")
        if instruction not in (None, self.task.instruction):
            raise InputError(f"{self.task.name} accepts only its own instruction, got {instruction!r}", code="unsupported")
        if shuffle:
            raise InputError("shuffle: the environment cannot swap objects", code="unsupported", field="shuffle")
        self._made.reset(seed if init_state is None else init_state, self._options)
        self.steps, self.success = 0, False
        self._state = state_of(self.task.description, self._made.moment)

    def step(self, action: ArrayLike) -> bool:
        """Execute an action (D,), clipped to the bounds. Returns whether the episode is over: by the environment, or by success
        where that ends it."""
        space, description = self.action_space, self.task.description
        values = np.asarray(action, np.float32)
        if values.shape != (space.dim,) or not np.isfinite(values).all():
            raise InputError(f"{self.task.where}: takes {space.dim} finite action values, got {values.tolist()}")
        over = self._made.step(space.clip(values))
        self.steps += 1
        self._state = state_of(description, self._made.moment)
        last = over or self.steps >= self.task.max_steps
        self.success = self._succeeds(description.success, last)
        return over or (self.success and description.end_on_success)

    def _succeeds(self, success: Success | str | None, last: bool) -> bool:
        """Whether the moment is a success; what an info does not hold before an episode's end is none."""
        if not isinstance(success, Success):
            return False
        moment = self._made.moment
        if success.value == "survived":
            return last and not moment.terminated
        try:
            return success.holds(moment)
        except InputError as error:
            if last or error.code != "missing-key":
                raise
            return False

    def observe(self) -> GymObservation:
        """The current observation; images are rendered here, if this environment renders at all."""
        images = {camera: self._turned(picture_at(place, camera, self._made)) for camera, place in self._pictures.items()}
        moment = self._made.moment
        return GymObservation(images, self._state.copy(), obs=moment.obs, info=moment.info)

    def _turned(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        turn = self.task.description.turn
        return image if turn == "none" else np.ascontiguousarray(image[::-1] if turn == "flip" else image[::-1, ::-1])

    def state(self) -> FloatArray:
        """Proprioception (S,)."""
        return self._state.copy()

    def close(self) -> None:
        """Free the simulation."""
        self._made.close()

    def __enter__(self) -> GymEnv:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
