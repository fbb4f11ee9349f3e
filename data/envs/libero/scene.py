"""What the simulator knows of a LIBERO scene and a robot does not: shapes, goals and every pose."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data.envs.libero.rotations import axis_angle, quaternion, rotation_matrix, scalar_last, yaw_matrix
from spvla.errors import InputError
from spvla.observation import Observation

Float64Array = NDArray[np.float64]

SURFACES = ("floor", "main_table", "kitchen_table", "coffee_table", "living_room_table", "study_table", "countertop")


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
class Part:
    """A drawer, a knob or a door: what moves along or about one axis of a fixture.

    Args:
        parent: the fixture, one of :attr:`Scene.names`.
        position, rotation: its pose in the fixture's frame when it is closed or off, float64 (3,), metres, and (3, 3).
        axis: unit vector in the fixture's frame, float64 (3,): it opens along it, or is turned on about it (right hand).
        slides: along the axis; else it turns.
    """

    parent: str
    position: Float64Array
    rotation: Float64Array
    axis: Float64Array
    slides: bool


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
        parts: the fixtures' drawers, knobs and doors by name.
    """

    instruction: str
    goal: tuple[tuple[str, ...], ...]
    names: tuple[str, ...]
    movable: tuple[str, ...]
    boxes: tuple[Float64Array, ...]
    regions: dict[str, Region]
    parts: dict[str, Part] = field(default_factory=dict)

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

    def opened(self, part: str) -> float:
        """How far a part of a fixture is open, metres, or turned on, radians."""
        known = self.scene.parts[part]
        frame = self.rotation(known.parent)
        if known.slides:
            return float((frame.T @ (self.position(part) - self.position(known.parent)) - known.position) @ known.axis)
        return float(axis_angle(quaternion(frame.T @ self.rotation(part) @ known.rotation.T)) @ known.axis)

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

    Images are upright, as in LIBERO's published data sets (see :mod:`data.envs.libero.env`)."""

    privileged: PrivilegedState = field(kw_only=True)


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
            quaternions=scalar_last(self._data.xquat[self.bodies]),
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
        parts=_read_parts(model, roots, parts),
    )
    return np.array(list(bodies.values()), np.int64), scene


def _read_parts(model: Any, roots: dict[str, int], bodies: dict[str, int]) -> dict[str, Part]:
    """What moves along or about one axis, from the compiled model: each joint opens towards the larger end of its range."""
    import mujoco

    closed = mujoco.MjData(model)
    mujoco.mj_kinematics(model, closed)  # every joint at its reference
    names = {body: name for name, body in roots.items()}
    parts = {}
    for name, body in bodies.items():
        joint, root = int(model.body_jntadr[body]), int(model.body_rootid[body])
        kind = int(model.jnt_type[joint])
        if kind not in (mujoco.mjtJoint.mjJNT_SLIDE, mujoco.mjtJoint.mjJNT_HINGE):
            continue
        frame = closed.xmat[root].reshape(3, 3)
        low, high = model.jnt_range[joint]
        axis = frame.T @ closed.xmat[body].reshape(3, 3) @ model.jnt_axis[joint] * (1.0 if abs(high) > abs(low) else -1.0)
        position = frame.T @ (closed.xpos[body] - closed.xpos[root])
        rotation = frame.T @ closed.xmat[body].reshape(3, 3)
        parts[name] = Part(names[root], position, rotation, axis, kind == mujoco.mjtJoint.mjJNT_SLIDE)
    return parts


_CUBE = np.array([[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)])


def _geom_corners(model: Any, geom: int) -> Float64Array:
    """Corners (8, 3) of a geom's bounding box in the geom's own frame: MuJoCo keeps its centre and half extents."""
    box = np.asarray(model.geom_aabb[geom], np.float64)
    return np.asarray(box[:3] + _CUBE * box[3:])


def project(matrix: ArrayLike, points: ArrayLike) -> Float64Array:
    """World points (..., 3) to pixels (..., 2), column and row, pixel centres at integers, by a camera matrix (3, 4)."""
    matrix, points = np.asarray(matrix, np.float64), np.asarray(points, np.float64)
    homogeneous = points @ matrix[:, :3].T + matrix[:, 3]
    return np.asarray(homogeneous[..., :2] / homogeneous[..., 2:])
