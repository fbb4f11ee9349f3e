"""What collecting and evaluating need of a simulator. A simulator comes in by one module and a name, see :mod:`data.envs`.

The terms are Gymnasium's (reset, step, observation); what differs is said here: an environment is one task's simulation, an
observation is only rendered when it is asked for, and ``step`` returns whether the episode is over. What only some simulators
can do is a protocol of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Protocol, runtime_checkable

from numpy.typing import ArrayLike

from spvla.actions import ActionSpace, FloatArray
from spvla.errors import InputError
from spvla.observation import MAIN, Observation
from spvla.vlas.base import VLA

RenderMode = Literal["full", "fast"]
SplitPart = Literal["training", "calibration", "evaluation"]
POINTS = ("hand", "place", "item")  # what is located in recorded images


@dataclass(frozen=True)
class Task:
    """One task of a suite.

    Args:
        suite: name of the suite, for example ``"libero_object"``.
        index: position in the suite's default order.
        name: the suite's name of the task.
        instruction: what the policy is asked to do.
        max_steps: step limit of an episode.
    """

    suite: str
    index: int
    name: str
    instruction: str
    max_steps: int

    @property
    def init_states(self) -> int:
        """How many fixed initial states the suite defines for this task; 0 where only seeds tell episodes apart."""
        return 0


def task_index(suite: str, names: Sequence[str], task: int | str) -> int:
    """Position of a task that is given by its name or its position.

    Raises:
        InputError: there is none (code ``unknown-task``); the message lists them.
    """
    if isinstance(task, str) and task in names:
        return list(names).index(task)
    if str(task).isdecimal() and int(task) < len(names):
        return int(task)
    listing = ", ".join(f"{i} {name}" for i, name in enumerate(names))
    raise InputError(f"unknown task {task!r} of suite {suite}; known: {listing}", code="unknown-task", field="tasks")


class Env(Protocol):
    """The simulation of one task. Reset it as often as needed; the same arguments give the same episode.

    Attributes:
        task: the task.
        action_space: what :meth:`step` takes, environment units.
        camera: what recordings call the camera of its images.
        steps: control steps since the reset.
        success: whether the goal holds now.
    """

    task: Task
    action_space: ActionSpace
    camera: str
    steps: int
    success: bool

    def reset(
        self, init_state: int | None = None, seed: int = 0, instruction: str | None = None, shuffle: bool = False
    ) -> None:
        """Start an episode; nothing is rendered.

        Args:
            init_state: index of a fixed initial state, or None for one drawn with ``seed``.
            seed: of everything that is drawn.
            instruction: what success means; None: the task's own instruction.
            shuffle: the objects trade places, as ``seed`` decides.

        Raises:
            InputError: there is no such initial state, or the instruction or shuffling is beyond this simulator.
        """

    def step(self, action: ArrayLike) -> bool:
        """Execute an action (D,) for one control step. Returns whether the episode is over.

        Raises:
            InputError: the action has another shape, or is not finite.
        """

    def observe(self) -> Observation:
        """What the robot sees and feels now. Images are upright, uint8 (H, W, 3)."""

    def state(self) -> FloatArray:
        """Proprioception alone, float32 (S,): renders nothing."""

    def close(self) -> None:
        """Free the simulation."""

    def __enter__(self) -> Env: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


@runtime_checkable
class Perturbable(Protocol):
    """An environment whose world can be disturbed."""

    def nudge(self, offset: ArrayLike) -> bool:
        """Move the object that is asked for by ``offset`` (2,), metres on its support. False if the hand is there already."""


@runtime_checkable
class HandTracking(Protocol):
    """An environment whose proprioception holds the hand's position.

    Attributes:
        hand_position: which values of :meth:`Env.state` that is, metres.
    """

    hand_position: tuple[int, ...]


@runtime_checkable
class Instructable(Protocol):
    """An environment in whose scenes several things can be asked for."""

    def instructions(self) -> list[str]:
        """What can be asked for now, the task's own instruction first."""

    def asked_object(self, instruction: str) -> str:
        """Name of the object that an instruction asks for."""

    def lifted(self) -> dict[str, float]:
        """Per movable object, its height above where it rested at the reset, metres."""


@runtime_checkable
class Privileged(Protocol):
    """An environment that knows where everything is: what labels are made of later, without simulating again."""

    def environment_state(self) -> FloatArray:
        """Every pose, float32 (E,); LeRobot's ``observation.environment_state``."""

    def scene_facts(self, instruction: str) -> dict[str, Any]:
        """What makes recorded images and environment states readable, JSON-ready."""


@runtime_checkable
class Annotator(Protocol):
    """A simulator that can read the environment states that it recorded: for auxiliary targets when a VLA is trained."""

    def image_points(self, states: FloatArray, facts: Mapping[str, Any]) -> FloatArray:
        """Where :data:`POINTS` are in the images, column and row in pixels, float32 (T, P, 2); NaN where unknown.

        Args:
            states: :meth:`Privileged.environment_state` at each step, (T, E).
            facts: the episode's metadata; ``scene`` holds :meth:`Privileged.scene_facts`.
        """

    def positions(self, states: FloatArray, facts: Mapping[str, Any]) -> FloatArray:
        """Where they are in the world, metres, float32 (T, P, 3); NaN where unknown."""

    def other_questions(
        self, states: FloatArray, labels: FloatArray, facts: Mapping[str, Any], instruction: str
    ) -> dict[str, tuple[FloatArray, FloatArray, FloatArray]]:
        """What else could have been asked for: by instruction, the expert's actions (T, D), NaN where they teach nothing,
        and where the object is in the images (T, 2) and in the world (T, 3)."""


@runtime_checkable
class Described(Protocol):
    """A simulator that a user's file describes.

    Attributes:
        stamp: a short hash of what the file says; what came of another one is not continued.
    """

    @property
    def stamp(self) -> str: ...


class Simulator(Protocol):
    """A family of suites.

    Attributes:
        action_space: of all its environments.
        conventions: name of what lies between its images and actions and the data that published VLAs were trained on
            (:data:`spvla.vlas.conventions.CONVENTIONS`), or None.
        camera: what recordings call the camera of its images.
    """

    action_space: ActionSpace
    conventions: str | None
    camera: str

    def tasks(self, suite: str, tasks: Sequence[int | str] | None = None, max_steps: int | None = None) -> Sequence[Task]:
        """The tasks of a suite, all of them or those named by index or name, in the order given.

        Raises:
            InputError: an unknown suite or task, or a limit below 1; the message lists the known ones.
        """

    def make(self, task: Task, *, render: RenderMode | None = None, cameras: Sequence[str] = (MAIN,)) -> Env:
        """The simulation of a task.

        Args:
            task: one of :meth:`tasks`.
            render: ``full``, ``fast`` where a simulator has a cheaper way, or None: it never renders.
            cameras: what to render: :data:`~spvla.observation.MAIN`, :data:`~spvla.observation.WRIST`, or others that the
                simulator knows by name.

        Raises:
            InputError: it has no such camera (code ``unknown-camera``).
        """

    def split(self, facts: Mapping[str, Any]) -> SplitPart | None:
        """What a recorded episode may be used for, by its metadata (``init_state``, ``seed``, ``task``, ...). Evaluation data
        is never trained on. None: no part was fixed for such an episode."""

    def expert(self) -> VLA:
        """A scripted policy that does the tasks, from what the simulator knows.

        Raises:
            InputError: this simulator has none.
        """
