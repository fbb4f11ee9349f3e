"""Meta-World's fifty tasks (arXiv 1910.10897), from the package ``metaworld``: the suite ``metaworld_mt50``.

Not obvious:

* The package asks for another MuJoCo than LIBERO's does. It runs with LIBERO's, so that one environment can hold both:
  ``pip install --no-deps metaworld==3.1.1`` after the extra ``metaworld`` (``make setup`` does it).
* The goal is part of what the scripted experts see, and of what a VLA would see in the image; proprioception is the hand's
  position and the opening of the gripper alone.
* Initial state i is the one that the task draws with the seed i. The first success ends an episode.
* The gripper takes an effort, which experts set to anything between -1 and 1: it is not binary.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data.envs.base import RenderMode, SplitPart, Task, task_index
from data.envs.render import Renderer
from spvla.actions import ActionSpace, FloatArray
from spvla.errors import InputError
from spvla.observation import MAIN, WRIST, Observation
from spvla.vlas.base import VLAOutput

SUITES = ("metaworld_mt50",)
INIT_STATES = 50
MAX_STEPS = 500
CAMERA, IMAGE_SIZE = "corner2", 256
CAMERAS = {MAIN: CAMERA, WRIST: "gripperPOV"}  # others go by the names that Meta-World gives them
SPACE = ActionSpace(
    name="metaworld",
    kind="eef_delta",
    control_rate=80.0,
    q01=(-1.0,) * 4,
    q99=(1.0,) * 4,
    low=(-1.0,) * 4,
    high=(1.0,) * 4,
    translation=(0, 1, 2),
    gripper=(3,),
    binary_gripper=False,
)
"""Displacement of the hand's target, 1 cm per unit and step, and the gripper's effort: +1 closes."""


class MetaWorldTask(Task):
    """One task; its name is Meta-World's, such as ``door-open-v3``."""

    @property
    def init_states(self) -> int:
        """How many fixed initial states there are."""
        return INIT_STATES


@dataclass(frozen=True)
class MetaWorldObservation(Observation):
    """An observation with everything that the scripted experts see: ``full``, float64 (39,)."""

    full: NDArray[np.float64] = field(kw_only=True)


class MetaWorldEnv:
    """One task's simulation, an :class:`~data.envs.base.Env`."""

    camera = CAMERA
    hand_position = (0, 1, 2)

    def __init__(self, task: Task, render: RenderMode | None = None, cameras: Sequence[str] = (MAIN,)) -> None:
        self.task, self.action_space = task, SPACE
        self.steps, self.success = 0, False
        self._env = _package().env_dict.ALL_V3_ENVIRONMENTS[task.name]()
        self._env._partially_observable = False  # experts see the goal, which the cached bounds of observations would hide
        self._env.__dict__.pop("sawyer_observation_space", None)
        self._env._set_task_called = True
        self._env._freeze_rand_vec, self._env.seeded_rand_vec = False, True
        self._full = np.zeros(39)
        self._renderer = None if render is None else Renderer(self._env.model, self._env.data, IMAGE_SIZE)
        renderer = self._renderer
        self._cameras = {} if renderer is None else {name: renderer.require(CAMERAS.get(name, name)) for name in cameras}

    def reset(
        self, init_state: int | None = None, seed: int = 0, instruction: str | None = None, shuffle: bool = False
    ) -> None:
        """See :meth:`data.envs.base.Env.reset`; only the task's own instruction can be given, and nothing trades places."""
        if init_state is not None and not 0 <= init_state < INIT_STATES:
            raise InputError(f"{self.task.name} has initial states 0-{INIT_STATES - 1}, got {init_state}")
        if instruction not in (None, self.task.instruction):
            raise InputError(f"{self.task.name} accepts only its own instruction, got {instruction!r}", code="unsupported")
        if shuffle:
            raise InputError("shuffle: Meta-World's objects cannot be swapped", code="unsupported", field="shuffle")
        self._env.seed(seed if init_state is None else init_state)
        self._full, _ = self._env.reset()
        self.steps, self.success = 0, False

    def step(self, action: ArrayLike) -> bool:
        """Execute an action (4,) for 12.5 ms. Returns whether the task has succeeded, which ends an episode."""
        values = np.asarray(action, np.float32)
        if values.shape != (SPACE.dim,) or not np.isfinite(values).all():
            raise InputError(f"Meta-World takes {SPACE.dim} finite action values, got {values.tolist()}")
        self._full, _, _, _, info = self._env.step(np.clip(values, -1, 1))
        self.steps += 1
        self.success = bool(info["success"])
        return self.success

    def observe(self) -> MetaWorldObservation:
        """The current observation; images are rendered here, if this environment renders at all."""
        images = {name: self._image(camera) for name, camera in self._cameras.items()}
        return MetaWorldObservation(images, self.state(), full=self._full.copy())

    def _image(self, camera: str) -> NDArray[np.uint8]:
        import mujoco

        assert self._renderer is not None
        colour, _ = self._renderer.draw(camera, mujoco.MjvOption())  # OpenGL's rows begin below
        return np.ascontiguousarray(colour[:, ::-1] if camera == CAMERA else colour[::-1])  # CAMERA is mounted upside down

    def state(self) -> FloatArray:
        """Proprioception (4,): the hand's position (m) and how far the gripper is open (0 to 1)."""
        return self._full[:4].astype(np.float32)

    def environment_state(self) -> FloatArray:
        """Everything that the experts see, (39,)."""
        return self._full.astype(np.float32)

    def scene_facts(self, instruction: str) -> dict[str, Any]:
        """Nothing beyond the episode's own metadata is needed to read :meth:`environment_state`."""
        return {}

    def close(self) -> None:
        """Free the simulation."""
        if self._renderer is not None:
            self._renderer.close()
        self._env.close()

    def __enter__(self) -> MetaWorldEnv:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class MetaWorldExpert:
    """The package's scripted experts as one VLA: the instruction chooses. It needs a :class:`MetaWorldObservation`."""

    action_space = SPACE
    needs_images = False

    def __init__(self) -> None:
        warnings.filterwarnings("ignore", r"Constant\(s\) may be too high")  # actions are clipped, as they have to be
        self._policies = {_instruction(name): policy for name, policy in _package().policies.ENV_POLICY_MAP.items()}
        self._policy: Any = None

    def reset(self, instruction: str) -> None:
        """Start an episode. Raises :class:`InputError` for an instruction that is none of the tasks'."""
        if instruction not in self._policies:
            raise InputError(f"Meta-World has no expert for task {instruction!r}", code="unsupported", field="instruction")
        self._policy = self._policies[instruction]()

    def predict(self, observation: Observation, keep_mass: float = 1.0) -> VLAOutput:
        """One action (1, 4). Raises :class:`InputError` without the simulator's own observation."""
        if not isinstance(observation, MetaWorldObservation):
            raise InputError("Meta-World's experts need a MetaWorldObservation, which its environment gives")
        action = np.clip(self._policy.get_action(observation.full), -1, 1)
        return VLAOutput(actions=np.asarray(action, np.float32)[None])


class MetaWorld:
    """The simulator ``metaworld``, a :class:`~data.envs.base.Simulator`."""

    action_space = SPACE
    conventions = None
    camera = CAMERA

    def tasks(self, suite: str, tasks: Sequence[int | str] | None = None, max_steps: int | None = None) -> list[Task]:
        """See :meth:`data.envs.base.Simulator.tasks`."""
        if suite not in SUITES:
            raise InputError(f"unknown Meta-World suite {suite!r}; known: {', '.join(SUITES)}", code="unknown-suite")
        names = list(_package().policies.ENV_POLICY_MAP)
        chosen = range(len(names)) if tasks is None else [task_index(suite, names, task) for task in tasks]
        limit = MAX_STEPS if max_steps is None else min(max_steps, MAX_STEPS)
        return [MetaWorldTask(suite, i, names[i], _instruction(names[i]), limit) for i in chosen]

    def make(self, task: Task, *, render: RenderMode | None = None, cameras: Sequence[str] = (MAIN,)) -> MetaWorldEnv:
        """See :class:`MetaWorldEnv`."""
        return MetaWorldEnv(task, render, cameras)

    def split(self, facts: Mapping[str, Any]) -> SplitPart | None:
        """By the seed of the reset, which initial state i has too: 0-19 train, 20-29 calibrate, 30-49 are for evaluation."""
        seed = facts.get("seed") if facts.get("init_state") is None else facts["init_state"]
        if not isinstance(seed, int) or seed not in range(INIT_STATES):
            return None
        return "evaluation" if seed >= 30 else "calibration" if seed >= 20 else "training"

    def expert(self) -> MetaWorldExpert:
        """See :class:`MetaWorldExpert`."""
        return MetaWorldExpert()


def _instruction(name: str) -> str:
    """``door-open-v3`` asks for "door open"."""
    return re.sub(r"-v\d+$", "", name).replace("-", " ")


def _package() -> Any:
    try:
        import metaworld
        import metaworld.env_dict
        import metaworld.policies
    except ImportError as error:
        raise InputError(
            f"Meta-World is not installed ({error}): pip install -e '.[metaworld]' and then pip install --no-deps "
            "metaworld==3.1.1 (--no-deps keeps LIBERO's version of MuJoCo)",
            code="not-installed",
            field="metaworld",
        ) from None
    return metaworld
