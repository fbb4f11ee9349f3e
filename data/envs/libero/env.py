"""The LIBERO simulator behind one class, by the protocol that published results use.

Protocol: seed, reset, set the initial state, ten no-op steps, then the episode; 20 Hz; the step limit belongs to the suite.
Not obvious:

* Observations show the end of the control step (robosuite's own are 2-4 ms older, at most half a millimetre).
* The simulation is independent of what ran before: what robosuite keeps between soft resets (the gripper's commanded
  opening) is put back, and numpy's global random state is left as it was found.
* Images are upright, as the published LIBERO data sets show them: OpenGL's rows turned by 180 degrees, which leaves left
  and right exchanged. Nothing is rendered unless :meth:`LiberoEnv.observe` is called.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data.envs.base import RenderMode
from data.envs.libero.expert import scene_instructions
from data.envs.libero.goals import parse_goal, predicates
from data.envs.libero.render import CAMERA, LiberoRenderer
from data.envs.libero.rotations import axis_angle, scalar_last
from data.envs.libero.scene import LiberoObservation, Poses, PrivilegedState
from data.envs.libero.tasks import LiberoTask, quiet
from spvla.actions import LIBERO
from spvla.errors import InputError
from spvla.observation import MAIN

Float64Array = NDArray[np.float64]
NO_OP = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
NO_OP_STEPS = 10
HAND_IS_THERE = 0.08  # metres from the hand within which an object is not nudged


@contextlib.contextmanager
def _numpy_seed(seed: int) -> Iterator[None]:
    """robosuite samples from numpy's global generator: seed it inside, restore it afterwards."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


class LiberoEnv:
    """One task's simulation, an :class:`~data.envs.base.Env`. It is deterministic and forgets what ran before.

    Args:
        task: from :func:`load_tasks`.
        render: ``full`` renders everything per image; ``fast`` draws what stands still once per reset and composes moving
            bodies onto it by depth; None never renders.
        image_size: height and width of the images in pixels.
        cameras: which cameras to render; beside :data:`~spvla.observation.MAIN` and :data:`~spvla.observation.WRIST` those that
            robosuite names, such as ``frontview``.
    """

    camera = CAMERA
    hand_position = (0, 1, 2)

    def __init__(
        self, task: LiberoTask, *, render: RenderMode | None = None, image_size: int = 256, cameras: Sequence[str] = (MAIN,)
    ) -> None:
        os.environ.setdefault("MUJOCO_GL", "egl")
        if os.environ["MUJOCO_GL"] == "egl":
            os.environ.setdefault("PYOPENGL_PLATFORM", "egl")
        with quiet(), _numpy_seed(0):
            from libero.libero.envs.env_wrapper import ControlEnv

            control = ControlEnv(
                bddl_file_name=str(task.bddl_file),
                use_camera_obs=False,
                has_renderer=False,
                has_offscreen_renderer=False,
                ignore_done=True,
            )
        self.task = task
        self.action_space = LIBERO
        self.steps = 0
        self.success = False
        self._control = control
        self._env = control.env
        self._env.hard_reset = False
        self._env._observables = {}  # read from MjData directly; updating them costs a tenth of the step time
        self._robot = self._env.robots[0]
        self._model = self._env.sim.model._model
        self._data = self._env.sim.data._data
        self._hand = self._env.sim.model.body_name2id(self._robot.robot_model.eef_name)
        self._poses = Poses(self._env, task.instruction)
        self._bodies, self.scene = self._poses.bodies, self._poses.scene
        self._init_states: Float64Array | None = None
        self._image_size = image_size
        self._goal: Sequence[tuple[str, ...]] = self.scene.goal
        self._instruction = task.instruction
        self._rest_heights = np.zeros(len(self.scene.names))
        self._renderer: LiberoRenderer | None = None
        if render:
            self._renderer = LiberoRenderer(self._model, self._data, image_size, cameras, render == "fast")

    def reset(
        self, init_state: int | None = None, seed: int = 0, instruction: str | None = None, shuffle: bool = False
    ) -> None:
        """Start an episode: seed, reset, set the initial state, ten no-op steps.

        Args:
            init_state: index of an official initial state; None keeps the object placements sampled with ``seed``.
            seed: for the placement of what an initial state does not hold (fixtures), and of everything if None.
            instruction: what makes this episode a success; None: the task's own instruction.
            shuffle: the movable objects, all but the one that things are placed in or on, trade places as ``seed`` decides.

        Raises:
            InputError: the index is out of range, the states do not belong to this scene, or the instruction is not one that
                :func:`~data.envs.libero.goals.parse_goal` understands.
        """
        self._instruction = instruction or self.task.instruction
        own = self._instruction == self.task.instruction
        self._goal = self.scene.goal if own else predicates(parse_goal(self._instruction, self.scene))
        state = None if init_state is None else self._init_state(init_state)
        with quiet(), _numpy_seed(seed):
            self._reset_simulation()
        if state is not None:
            self._control.set_init_state(state)
        if shuffle:
            place = self.scene.body_of(parse_goal(self._instruction, self.scene).place)
            self._trade_places([name for name in self.scene.movable if name != place], seed)
        for _ in range(NO_OP_STEPS):
            self._env.step(NO_OP)
        self.steps = 0
        self.success = self._achieved()
        self._rest_heights = self._data.xpos[self._bodies, 2].copy()
        if self._renderer is not None:
            self._renderer.forget_background()

    def step(self, action: ArrayLike) -> bool:
        """Execute one action (7,) for 50 ms. Returns whether the goal holds now, which ends an episode.

        Raises:
            InputError: not seven finite values.
        """
        action = np.asarray(action, np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise InputError(f"LIBERO takes 7 finite action values, got {action.tolist()}")
        self._env.step(action)
        self.steps += 1
        self.success = self._achieved()
        return self.success

    def nudge(self, offset: ArrayLike) -> bool:
        """Displace the asked object by ``offset`` (2,), metres along world x and y, at once; not if the hand is at it."""
        name, state = parse_goal(self._instruction, self.scene).item, self.privileged()
        if np.linalg.norm(state.position(name) - state.eef_position) < HAND_IS_THERE:
            return False
        joint = int(self._model.body_jntadr[self._bodies[self.scene.movable.index(name)]])
        start = int(self._model.jnt_qposadr[joint])
        self._data.qpos[start : start + 2] += np.asarray(offset, np.float64)
        self._env.sim.forward()
        return True

    def _trade_places(self, names: Sequence[str], seed: int) -> None:
        joints = [int(self._model.body_jntadr[self._bodies[self.scene.movable.index(name)]]) for name in names]
        across = [int(self._model.jnt_qposadr[joint]) + axis for joint in joints for axis in (0, 1)]
        order = np.random.default_rng([seed, 3]).permutation(len(joints))
        self._data.qpos[across] = self._data.qpos[across].reshape(-1, 2)[order].ravel()
        self._env.sim.forward()

    def _achieved(self) -> bool:
        return all(bool(self._env._eval_predicate(list(predicate))) for predicate in self._goal)

    def observe(self) -> LiberoObservation:
        """The current observation; images are rendered here, if this environment renders at all."""
        images = {} if self._renderer is None else self._renderer.images()
        return LiberoObservation(images, self.state(), privileged=self.privileged())

    def state(self) -> NDArray[np.float32]:
        """Proprioception (8,): end effector position 3 (m), axis-angle 3 (rad), finger positions 2 (m)."""
        fingers = self._data.qpos[self._robot._ref_gripper_joint_pos_indexes]
        rotation = axis_angle(scalar_last(self._data.xquat[self._hand]))
        return np.concatenate([self._poses.eef_position(), rotation, fingers]).astype(np.float32)

    def privileged(self) -> PrivilegedState:
        """Every pose, without rendering."""
        return self._poses.read()

    def environment_state(self) -> NDArray[np.float32]:
        """Every pose, float32 (E,): see :meth:`PrivilegedState.to_vector`."""
        return self.privileged().to_vector()

    def scene_facts(self, instruction: str) -> dict[str, Any]:
        """What makes recorded images and environment states readable, JSON-ready.

        Returns ``bodies`` (their order in the environment state), ``centres`` (see :meth:`Scene.centres`), ``camera`` (its
        projection, see :func:`~data.envs.libero.scene.project`), and the bodies asked for, ``item`` and ``place``, None where
        the instruction is not understood.
        """
        try:
            goal = parse_goal(instruction, self.scene)
            item, place = goal.item, self.scene.body_of(goal.place)
        except InputError:
            item, place = None, None
        return {
            "bodies": list(self.scene.names),
            "centres": self.scene.centres().round(4).tolist(),
            "camera": self.camera_matrix().round(5).tolist(),
            "item": item,
            "place": place,
        }

    def instructions(self) -> list[str]:
        """What can be asked for now, the task's own instruction first."""
        return scene_instructions(self.privileged())

    def asked_object(self, instruction: str) -> str:
        """The body that an instruction asks for. Raises :class:`InputError` if it is not understood."""
        return parse_goal(instruction, self.scene).item

    def camera_matrix(self) -> Float64Array:
        """The main camera's projection (3, 4), from world points to an observation's pixels: see :func:`project`."""
        import mujoco

        camera = mujoco.mj_name2id(self._model, mujoco.mjtObj.mjOBJ_CAMERA, CAMERA)
        position, axes = self._data.cam_xpos[camera], self._data.cam_xmat[camera].reshape(3, 3)  # columns: right, up, back
        focal = self._image_size / 2 / np.tan(np.deg2rad(self._model.cam_fovy[camera]) / 2)
        middle = (self._image_size - 1) / 2
        # Depth lies along -back. Upright images (see the module) show the world's up above and its right on the left.
        intrinsic = np.array([[-focal, 0.0, -middle], [0.0, -focal, -middle], [0.0, 0.0, -1.0]])
        extrinsic = np.concatenate([axes.T, -(axes.T @ position)[:, None]], axis=1)
        return np.asarray(intrinsic @ extrinsic)

    def lifted(self) -> dict[str, float]:
        """Height of each movable object above where it rested when the episode began, metres."""
        heights = self._data.xpos[self._bodies, 2] - self._rest_heights
        return {name: float(heights[self.scene.names.index(name)]) for name in self.scene.movable}

    def close(self) -> None:
        """Free the simulation and the renderer's buffers."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        self._control.close()

    def __enter__(self) -> LiberoEnv:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _init_state(self, index: int) -> Float64Array:
        if self._init_states is None:
            states = self.task.read_init_states()
            expected = 1 + self._model.nq + self._model.nv
            if states.shape[1] != expected:
                raise InputError(
                    f"{self.task.init_states_file}: states have {states.shape[1]} values, the scene needs {expected}"
                )
            self._init_states = states
        if not 0 <= index < len(self._init_states):
            raise InputError(
                f"{self.task.suite} task {self.task.name!r} has initial states 0-{len(self._init_states) - 1}, got {index}"
            )
        return self._init_states[index]

    def _reset_simulation(self) -> None:
        # Not ControlEnv.reset: its retry loop swallows every exception, Ctrl-C included.
        from robosuite.utils.errors import RandomizationError

        while True:
            try:
                self._env.reset()
                break
            except RandomizationError:
                continue
        # A soft reset keeps the gripper object and with it the opening it last commanded.
        self._robot.gripper.current_action = np.zeros(self._robot.gripper.dof)
