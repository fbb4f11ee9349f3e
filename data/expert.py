"""A scripted expert for LIBERO's pick-and-place tasks, playing the VLA's part: a stateless function of every pose.

Because it keeps no memory it can label any state that some policy visited, after recorded or noisy actions, and it
recovers from drops, slips and pushes. Labels are made to be learnt: velocities taper over ten centimetres, heights
follow continuous funnels, and each gripper decision has slack on both sides (sudden switches taught a distilled policy
to hop between modes). Shapes come from the simulator's collision geometry, the goal from the instruction.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.libero import LiberoObservation, PrivilegedState, Scene, axis_angle, quaternion, rotation_matrix
from spvla.actions import LIBERO
from spvla.errors import InputError
from spvla.observation import Observation
from spvla.vlas.base import VLAOutput

Float64Array = NDArray[np.float64]

# The hand (metres; the Panda gripper's collision geometry, relative to the point between the fingertips).
OPEN_GAP = 0.078  # finger gap when open
FINGERTIP_BELOW = 0.013  # how far the fingers reach below that point
FINGER_REACH = np.array([0.02, 0.07])  # half footprint (x, y) of the open fingers
PALM_ABOVE = 0.035  # height of the palm above that point
PALM_REACH = np.array([0.04, 0.105])  # half footprint (x, y) of the palm
PAD_BAND = 0.008  # half height of the finger pads: the part of an object that decides how wide the grip is

# Motion. An action of 1 moves 12.5 mm per step in steady state.
TAPER = 0.10  # distance over which speed falls, like constant braking
SOFT = 0.005  # below this distance speed is proportional to it
LEVEL_GAIN = 2.0  # rotation action per radian of tilt
LEVEL_LIMIT = 0.3
LEVEL = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])  # hand straight down, fingers along y

# Reaching.
ABOVE_BOTTOM = 0.012  # grasp at least this far above the object's bottom: the fingertips must not touch the table ...
BELOW_TOP = 0.032  # ... and not deeper than this below its top: the palm must not touch the object
SLACK_X = 0.016  # across the fingers (the camera's depth direction) a grasp may be this far off
SLACK_MARGIN = 0.004  # along the fingers: half of the free gap less this
REACH_STEEP = 4.0  # height over lateral distance of the funnel next to the object
REACH_FAR = (0.05, 0.8)  # height and slope of the way down from afar
CLEARANCE = 0.02  # above obstacles
OBSTACLE_SLOPE = 1.5  # height over distance of the slope that leads over an obstacle
CLOSE_BELOW = 0.008  # fingers close once this near to the grasp height
GRIPPED = (0.008, 0.002)  # lifting ramps from 0 to 1 while the gap falls from width + the first to width + the second

# Placing.
CARRY_ABOVE = 0.04  # bottom of the carried object above everything else
RELEASE_IN = 0.03  # release with the bottom this far below a container's rim ...
RIM_CLEARANCE = 0.008  # ... or, for tall objects, further down, until the fingertips are nearly this far above the rim
RELEASE_ON = -0.005  # lower down to this above a surface (negative: until it touches)
RELEASE_EARLY = 0.02  # the fingers open this far above the lowest point, on the way down
PLACE_STEEP = 3.0  # height over lateral distance of the funnel above the place
PLACE_SLACK = 0.012  # at least, metres of lateral tolerance when releasing
RETREAT = 0.10  # height above the place after release


@dataclass(frozen=True)
class Goal:
    """What to do: bring ``item`` into or onto ``place``, a region's or a body's name; ``inside`` tells which."""

    item: str
    place: str
    inside: bool


def parse_goal(instruction: str, scene: Scene) -> Goal:
    """The goal that an instruction means in a scene.

    The task's own instruction means the task's own goal; any other must name an object and a place of the scene, as
    in "pick up the milk and place it in the basket".

    Raises:
        InputError: if the expert cannot do it: another kind of task, or names that are not in the scene.
    """
    text = " ".join(instruction.lower().split())
    if text == " ".join(scene.instruction.lower().split()):
        for predicate in scene.goal:
            if len(scene.goal) == 1 and predicate[0] in ("in", "on") and predicate[1] in scene.movable:
                return Goal(predicate[1], predicate[2], predicate[0] == "in")
        raise InputError(f"the expert cannot do {instruction!r}: its goal {scene.goal} is not one pick and place")
    match = re.fullmatch(
        r"(?:pick up|pick|grab) (?:the )?(.+?) and (?:place|put) it (in|on|into|onto) (?:the )?(.+)", text
    )
    if match is None:
        raise InputError(f"the expert cannot do {instruction!r}: it knows 'pick up the X and place it in the Y'")
    item, preposition, place = match[1], match[2], match[3]
    found = Goal(_named(item, scene, instruction), _named(place, scene, instruction), preposition.startswith("in"))
    insides = [name for name, region in scene.regions.items() if region.parent == found.place and "contain" in name]
    return Goal(found.item, insides[0], True) if found.inside and insides else found


def _named(words: str, scene: Scene, instruction: str) -> str:
    """The one movable object called ``words`` (``alphabet_soup_1`` is "alphabet soup")."""
    names = [name for name in scene.movable if re.sub(r"_\d+$", "", name).replace("_", " ") == words]
    if len(names) != 1:
        known = ", ".join(scene.movable)
        raise InputError(f"the expert cannot do {instruction!r}: {words!r} is not one of the scene's objects ({known})")
    return names[0]


class Expert:
    """The scripted expert as a :class:`spvla.vlas.base.VLA`. It reads poses, so it needs a :class:`LiberoObservation`."""

    action_space = LIBERO
    needs_images = False

    def __init__(self) -> None:
        self._instruction = ""

    def reset(self, instruction: str) -> None:
        """Start an episode with ``instruction``."""
        self._instruction = instruction

    def predict(self, observation: Observation, keep_mass: float = 1.0) -> VLAOutput:
        """One action (1, 7). Raises :class:`InputError` without poses or for an instruction it cannot do."""
        if not isinstance(observation, LiberoObservation):
            raise InputError("the expert reads object poses: it needs a LiberoObservation from data.libero.LiberoEnv")
        state = observation.privileged
        action = expert_action(state, parse_goal(self._instruction, state.scene))
        return VLAOutput(actions=action[None].astype(np.float32))


def expert_action(state: PrivilegedState, goal: Goal) -> Float64Array:
    """The expert's action (7,) in LIBERO's units for any state."""
    item = _extent(state, goal.item)
    place = _plan_place(state, goal, item)
    if place.done:
        up = place.surface + RETREAT - state.eef_position[2]
        return _action(state, np.array([0.0, 0.0, _speed(up) if up > 0 else 0.0]), close=False)
    grasp = _plan_grasp(state, goal.item, item)
    if _between_fingers(state, grasp, item):
        velocity, release = _carry(state, goal, item, place)
        if release:
            return _action(state, velocity, close=False)
        if (grip := _grip(state, grasp)) > 0:
            return _action(state, grip * velocity, close=True)
    velocity, close = _reach(state, goal, grasp, item)
    return _action(state, velocity, close)


def _action(state: PrivilegedState, velocity: Float64Array, close: bool) -> Float64Array:
    """Velocity (3,) plus whatever levels the hand, plus the gripper's command."""
    tilt = axis_angle(quaternion(LEVEL @ rotation_matrix(state.eef_quaternion).T))
    level = np.clip(LEVEL_GAIN * tilt, -LEVEL_LIMIT, LEVEL_LIMIT)
    return np.concatenate([velocity, level, [1.0 if close else -1.0]])


def _speed(distance: Float64Array | float) -> Float64Array:
    """Signed action for signed distances: 1 beyond the taper, then like constant braking, proportional at the end."""
    d = np.abs(distance)
    return np.asarray(np.sign(distance) * np.minimum(1.0, d / np.sqrt(TAPER * (d + SOFT))))


def _towards(error: Float64Array) -> Float64Array:
    """Lateral action (2,) straight along ``error`` (2,)."""
    distance = np.abs(error).max()
    return error * (_speed(distance) / distance) if distance > 0 else np.zeros(2)


def _beyond(error: Float64Array, slack: Float64Array) -> Float64Array:
    """``error`` shortened by ``slack`` in each dimension, 0 within it."""
    return np.sign(error) * np.maximum(np.abs(error) - slack, 0.0)


def _extent(state: PrivilegedState, name: str) -> Float64Array:
    """World bounds (2, 3) of a body's collision geometry."""
    bounds = state.bounds(name)
    return np.stack([bounds[:, 0].min(0), bounds[:, 1].max(0)])


def _obstacle_height(extents: Float64Array, centre: Float64Array, reach: Float64Array) -> float:
    """Height that something with half footprint ``reach`` at ``centre`` must have to pass over ``extents`` (K, 2, 3)."""
    gap = np.maximum(extents[:, 0, :2] - (centre + reach), (centre - reach) - extents[:, 1, :2])
    distance = np.linalg.norm(np.maximum(gap, 0.0), axis=1)
    return float((extents[:, 1, 2] + CLEARANCE - OBSTACLE_SLOPE * distance).max(initial=-np.inf))


def _others(state: PrivilegedState, *names: str) -> Float64Array:
    """World bounds (K, 2, 3) of all movable objects but ``names``."""
    return np.array([_extent(state, n) for n in state.scene.movable if n not in names]).reshape(-1, 2, 3)


@dataclass(frozen=True)
class _Grasp:
    point: Float64Array  # (3,) where the point between the fingertips should be
    width: float  # of the object between the fingers, metres
    slack: Float64Array  # (2,) lateral tolerance


def _plan_grasp(state: PrivilegedState, name: str, item: Float64Array) -> _Grasp:
    low, high = item
    height = max(low[2] + ABOVE_BOTTOM, high[2] - BELOW_TOP)
    bounds = state.bounds(name)
    at_height = bounds[(bounds[:, 0, 2] <= height + PAD_BAND) & (bounds[:, 1, 2] >= height - PAD_BAND)]
    near, far = at_height[:, 0, :2].min(0), at_height[:, 1, :2].max(0)
    centre, width = (near + far) / 2, float(far[1] - near[1])
    half_x = float(far[0] - near[0]) / 2
    centre = centre + np.array([_dodge(state, name, centre, height, half_x), 0.0])
    slack = np.array([min(SLACK_X, 0.25 * half_x), max((OPEN_GAP - width) / 2 - SLACK_MARGIN, 0.003)])
    return _Grasp(np.array([*centre, height]), width, slack)


def _dodge(state: PrivilegedState, name: str, centre: Float64Array, height: float, half_x: float) -> float:
    """Shift of the grasp along x (metres) that keeps the palm off taller neighbours, within the object's length."""
    others = _others(state, name)
    tall = others[others[:, 1, 2] > height + PALM_ABOVE - CLEARANCE]
    beside = tall[(tall[:, 0, 1] < centre[1] + PALM_REACH[1]) & (tall[:, 1, 1] > centre[1] - PALM_REACH[1])]
    ahead = beside[beside[:, :, 0].mean(1) > centre[0]]
    behind = beside[beside[:, :, 0].mean(1) <= centre[0]]
    most = (ahead[:, 0, 0] - PALM_REACH[0]).min(initial=np.inf) - centre[0]
    least = (behind[:, 1, 0] + PALM_REACH[0]).max(initial=-np.inf) - centre[0]
    shift = np.clip(0.0, least, most) if least <= most else (least + most) / 2
    room = max(half_x - 0.012, 0.0)
    return float(np.clip(shift, -room, room))


def _between_fingers(state: PrivilegedState, grasp: _Grasp, item: Float64Array) -> bool:
    """Whether the object is between the fingers, held or not."""
    eef, (low, high) = state.eef_position, item
    return bool(
        low[0] + 0.003 < eef[0] < high[0] - 0.003
        and low[2] - 0.005 < eef[2] < high[2] + 0.003
        and abs(eef[1] - grasp.point[1]) < state.finger_gap / 2
    )


def _grip(state: PrivilegedState, grasp: _Grasp) -> float:
    """How firmly an object between the fingers is held: 0 not at all, 1 firmly."""
    start, full = grasp.width + GRIPPED[0], grasp.width + GRIPPED[1]
    return float(np.clip((start - state.finger_gap) / (start - full), 0.0, 1.0))


def _reach(state: PrivilegedState, goal: Goal, grasp: _Grasp, item: Float64Array) -> tuple[Float64Array, bool]:
    """Velocity (3,) towards the grasp, and whether to close the fingers."""
    eef, gap = state.eef_position, state.finger_gap
    error = grasp.point[:2] - eef[:2]
    off = float(np.linalg.norm(_beyond(error, grasp.slack)))
    if off == 0.0 and abs(eef[2] - grasp.point[2]) < CLOSE_BELOW:
        return np.zeros(3), True
    # Fingers that are not open cannot go down over the object.
    shut = np.clip((grasp.width + 0.01 - gap) / 0.01, 0.0, 1.0)
    over = float(item[1, 2]) + FINGERTIP_BELOW + CLEARANCE - grasp.point[2]
    steep = REACH_STEEP * off + shut * over
    far = min(REACH_STEEP * off, REACH_FAR[0] + REACH_FAR[1] * off)
    others = _others(state, goal.item)
    clear = max(
        _obstacle_height(others, eef[:2], FINGER_REACH) + FINGERTIP_BELOW,
        _obstacle_height(others, eef[:2], PALM_REACH) - PALM_ABOVE,
    )
    height = grasp.point[2] + float(np.clip(clear - grasp.point[2], far, max(steep, far)))
    rise = height - eef[2]
    free = float(np.clip(1.0 - (rise - 0.01) / 0.05, 0.0, 1.0))
    lateral = free * _towards(_beyond(error, grasp.slack / 2))
    return np.array([*lateral, _speed(rise)]), False


@dataclass(frozen=True)
class _Place:
    centre: Float64Array  # (2,) where the object's middle should be
    surface: float  # height of the rim or the surface
    bottom: float  # height of the object's bottom when released
    slack: Float64Array  # (2,) lateral tolerance
    done: bool  # the object is where it should be


def _plan_place(state: PrivilegedState, goal: Goal, item: Float64Array) -> _Place:
    region = state.scene.regions.get(goal.place)
    body = goal.place if region is None else region.parent
    position = state.position(goal.item)
    half = (item[1] - item[0])[:2] / 2
    if region is not None:
        centre, size = state.region(goal.place)
    else:
        centre, size = state.position(goal.place), np.zeros(3)
    surface = float(_extent(state, body)[1, 2]) if body is not None else float(centre[2])
    if goal.inside:
        slack = np.maximum(size[:2] - half - 0.01, PLACE_SLACK)
        done = bool((np.abs(position - centre) < size).all())
        return _Place(centre[:2], surface, surface - RELEASE_IN, slack, done)
    off = float(np.linalg.norm((position - centre)[:2]))
    done = off < 0.025 and item[0, 2] < surface + RELEASE_ON
    return _Place(centre[:2], surface, surface + RELEASE_ON, np.full(2, PLACE_SLACK), done)


def _carry(state: PrivilegedState, goal: Goal, item: Float64Array, place: _Place) -> tuple[Float64Array, bool]:
    """Velocity (3,) towards the place with the object in hand, and whether to let go."""
    low, high = item
    centre, half, bottom = (low + high)[:2] / 2, (high - low)[:2] / 2, float(low[2])
    error = place.centre - centre
    off = float(np.linalg.norm(_beyond(error, place.slack)))
    others = _others(state, goal.item)
    carry = max(float(others[:, 1, 2].max(initial=0.0)), place.surface) + CARRY_ABOVE
    hanging = state.eef_position[2] - FINGERTIP_BELOW - bottom
    lowest = min(place.bottom, place.surface + RIM_CLEARANCE - hanging) if goal.inside else place.bottom
    height = min(lowest + PLACE_STEEP * off, carry)
    needed = min(_obstacle_height(others, centre, half), height)
    free = float(np.clip(1.0 - (needed - bottom) / 0.04, 0.0, 1.0))
    lateral = free * _towards(_beyond(error, place.slack / 2))
    release = off == 0.0 and bottom < lowest + RELEASE_EARLY
    return np.array([*lateral, _speed(height - bottom)]), release


def load(checkpoint: str | None = None) -> Expert:
    """The expert by its built-in name ``expert``; it has no checkpoint."""
    if checkpoint is not None:
        raise InputError(f"policy 'expert' takes no checkpoint, got {checkpoint!r}")
    return Expert()
