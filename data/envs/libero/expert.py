"""A scripted expert for LIBERO's pick-and-place tasks, playing the VLA's part: a stateless function of every pose.

Because it keeps no memory it can label any state that some policy visited, after recorded or noisy actions, and it
recovers from drops, slips and pushes. Labels are made to be learnt: velocities taper over several centimetres,
heights follow continuous funnels, and each gripper decision has slack (sudden switches taught a distilled policy to hop
between modes). Shapes come from the simulator's collision geometry, the goal from the instruction.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.envs.libero.goals import Goal, object_words, parse_goal
from data.envs.libero.rotations import axis_angle, quaternion, rotation_matrix, yaw_matrix
from data.envs.libero.scene import LiberoObservation, PrivilegedState
from spvla.actions import LIBERO
from spvla.errors import InputError
from spvla.observation import Observation
from spvla.vlas.base import VLAOutput

Float64Array = NDArray[np.float64]

# The hand: the Panda gripper's collision geometry, metres, relative to the point between the fingertips.
OPEN_GAP = 0.078  # finger gap when open
FINGERTIP_BELOW = 0.013  # how far the fingers reach below that point
FINGER_REACH = np.array([0.02, 0.07])  # half footprint of the open fingers, across and along the finger axis
PALM_ABOVE = 0.03  # height of the palm above that point
PALM_REACH = np.array([0.035, 0.105])  # half footprint of the palm
PAD_HALF = 0.008  # half width and half height of a finger pad
LEVEL = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])  # the hand straight down, fingers along y

# Motion. An action of 1 moves 12.5 mm, or turns 0.125 rad, per step in steady state.
LATERAL_TAPER = 0.045  # metres over which the lateral speed falls, like constant braking
VERTICAL_TAPER = 0.07
SOFT = 0.005  # below this distance speed is proportional to it
TURN_GAIN = 2.0  # rotation action per radian
TURN_LIMIT = 0.4

# Reaching.
WIDEST = 0.070  # widest thing to grasp: leaves 4 mm on both sides
TURNS = tuple(float(turn) for turn in np.deg2rad([0, 30, -30, 60, -60, 90, -90]))  # ways to turn the hand
TIGHT = -0.004  # metres of free space that do for a grasp (bounds are generous); with less the hand turns
BASE_X, FAR = -0.63, 0.69  # the arm stands here, and loses strength this far out with the hand down low
ROOM = 0.03  # more free space than this around the fingers does not make a grasp better
NEARNESS = 0.01  # metres of that space that a grasp is worth which is a metre nearer to the middle
ABOVE_BOTTOM = 0.012  # grasp at least this far above the object's bottom: fingertips must not touch the table ...
BELOW_TOP = 0.032  # ... and not deeper than this below its top: the palm must not touch the object
BELOW_RIM = 0.022  # the same for a hollow object's rim
SLACK_ACROSS = 0.35  # of the object's half length: how far off a grasp may be across the finger axis ...
SLACK_MOST = 0.016  # ... and at most, in metres
WALL_SLACK = 0.008  # the same for a wall, which is curved
SLACK_MARGIN = 0.004  # along the finger axis: half of the free gap less this
STEEP = 3.0  # height over lateral distance of the funnel next to the object
SLOPE = 0.4  # of the way down from afar: flat transit
CLEARANCE = 0.02  # above obstacles
OBSTACLE_SLOPE = 1.5  # height over distance of the slope that leads over an obstacle
YAW_SLACK = 0.15  # radians the hand may be turned off when it goes down ...
YAW_LENGTH = 0.05  # ... and the lateral distance that one radian more counts as
CLOSE_LATERAL = 0.005  # fingers close this far outside the lateral slack, so that noise does not keep them open ...
CLOSE_HEIGHT = (0.006, 0.012)  # ... and once this near to the grasp height (flat, tall objects)
LOOSE, FIRM = 0.008, 0.002  # lifting ramps up while the gap falls from width + LOOSE to width + FIRM
EMPTY = 0.35  # of the width: fingers closed further than this hold nothing
WALL = 0.007  # finger gap on a hollow object's wall; its collision boxes lean, so that their bounds say nothing
WALL_DEPTH = 0.008  # fingers closed on a wall hold it if they are this far below the rim

# Placing.
CARRY_ABOVE = 0.04  # bottom of the carried object above the rim or surface, on the way
LIFTED, LIFT_TAPER, LIFT_SIDEWAYS = 0.02, 0.08, 0.25  # up first: sideways speed grows over the last metres of the rise
RELEASE_IN = 0.03  # lower it until the bottom is this far below a container's rim ...
RIM_CLEARANCE = 0.008  # ... or, if tall, further: until the fingertips are this far above the rim
RELEASE_ON = -0.005  # lower it to this height above a surface (negative: until it touches)
RELEASE_EARLY = 0.02  # into a container: the fingers open this far above the lowest point, on the way down
PLACE_STEEP = 3.0  # height over lateral distance of the funnel above the place
PLACE_SLACK = 0.012  # least lateral tolerance when releasing
RETREAT = 0.10  # height above the place after release
LET_GO = (0.055, 0.075)  # finger gap between which the retreat starts: not with the object still in hand


def scene_instructions(state: PrivilegedState) -> list[str]:
    """What one may ask for in a scene: the task's own instruction, then the same for each other thing that fits the hand.

    Raises:
        InputError: the task is not of the form "pick up the X and place it in the Y".
    """
    own = parse_goal(state.scene.instruction, state.scene)
    words = object_words(own.item)
    if words not in state.scene.instruction:
        raise InputError(f"{state.scene.instruction!r} does not mention {words!r}, so no other object can be asked for")
    place = state.scene.body_of(own.place)
    out = [state.scene.instruction]
    for name in state.scene.movable:
        alike = [other for other in state.scene.movable if object_words(other) == object_words(name)]
        if name in (own.item, place) or len(alike) > 1:
            continue
        goal = Goal(name, own.place, own.inside)
        if _plan_grasp(state, goal, _plan_place(state, goal, _extent(state, name))).width <= WIDEST:
            out.append(state.scene.instruction.replace(words, object_words(name)))
    return out


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
            raise InputError("the expert reads object poses: it needs a LiberoObservation, which LIBERO's environment gives")
        state = observation.privileged
        action = expert_action(state, parse_goal(self._instruction, state.scene))
        return VLAOutput(actions=action[None].astype(np.float32))


def expert_action(state: PrivilegedState, goal: Goal) -> Float64Array:
    """The expert's action (7,) in LIBERO's units for any state."""
    item = _extent(state, goal.item)
    place = _plan_place(state, goal, item)
    if place.done:
        up = _speed(max(place.surface + RETREAT - state.eef_position[2], 0.0), VERTICAL_TAPER)
        free = float(np.clip((state.finger_gap - LET_GO[0]) / (LET_GO[1] - LET_GO[0]), 0.0, 1.0))
        return _action(state, np.array([0.0, 0.0, free * up]), 0.0, close=False)
    held = _held(state, goal.item, item)
    if held is not None:
        velocity, release = _carry(state, goal, item, place)
        if release:
            return _action(state, velocity, 0.0, close=False)
        if held > 0:
            return _action(state, held * velocity, 0.0, close=True)
    grasp = _plan_grasp(state, goal, place)
    velocity, close = _reach(state, goal, grasp, item, surrounded=held is not None)
    return _action(state, velocity, grasp.yaw, close)


def _action(state: PrivilegedState, velocity: Float64Array, yaw: float, close: bool) -> Float64Array:
    """Velocity (3,), plus what levels the hand and turns it to ``yaw``, plus the gripper's command."""
    error = axis_angle(quaternion(yaw_matrix(yaw) @ LEVEL @ rotation_matrix(state.eef_quaternion).T))
    turn = np.clip(TURN_GAIN * error, -TURN_LIMIT, TURN_LIMIT)
    return np.concatenate([velocity, turn, [1.0 if close else -1.0]])


def _hand_yaw(state: PrivilegedState) -> float:
    """How far the hand is turned about the vertical axis, radians."""
    fingers = rotation_matrix(state.eef_quaternion)[:, 0]
    return float(np.arctan2(-fingers[0], fingers[1]))


def _speed(distance: float, taper: float) -> float:
    """Signed action for a signed distance: 1 beyond the taper, then like constant braking, proportional at the end."""
    d = abs(distance)
    return float(np.sign(distance) * min(1.0, d / np.sqrt(taper * (d + SOFT))))


def _towards(error: Float64Array) -> Float64Array:
    """Lateral action (2,) straight along ``error`` (2,)."""
    distance = float(np.abs(error).max())
    return error * (_speed(distance, LATERAL_TAPER) / distance) if distance > 0 else np.zeros(2)


def _beyond(error: Float64Array, slack: Float64Array) -> Float64Array:
    """``error`` shortened by ``slack`` in each dimension, 0 within it."""
    return np.asarray(np.sign(error) * np.maximum(np.abs(error) - slack, 0.0))


def _extent(state: PrivilegedState, name: str, yaw: float = 0.0) -> Float64Array:
    """Bounds (2, 3) of a body's collision geometry, in a frame turned by ``yaw``."""
    bounds = state.bounds(name, yaw)
    return np.stack([bounds[:, 0].min(0), bounds[:, 1].max(0)])


def _others(state: PrivilegedState, item: str, yaw: float = 0.0, support: str | None = None) -> Float64Array:
    """Bounds (K, 2, 3) of all that could be in the way: other objects whole, fixtures by their geoms."""
    movable = state.scene.movable
    names = [name for name in state.scene.names if name not in (item, support)]
    parts = [_extent(state, name, yaw)[None] if name in movable else state.bounds(name, yaw) for name in names]
    return np.concatenate([np.empty((0, 2, 3)), *parts])


def _obstacle_height(extents: Float64Array, centre: Float64Array, reach: Float64Array) -> float:
    """Height that something with half footprint ``reach`` at ``centre`` must have to pass over ``extents`` (K, 2, 3)."""
    gap = np.maximum(extents[:, 0, :2] - (centre + reach), (centre - reach) - extents[:, 1, :2])
    distance = np.linalg.norm(np.maximum(gap, 0.0), axis=1)
    return float((extents[:, 1, 2] + CLEARANCE - OBSTACLE_SLOPE * distance).max(initial=-np.inf))


@dataclass(frozen=True)
class _Grasp:
    point: Float64Array  # (3,) where the point between the fingertips should be
    yaw: float  # of the hand
    width: float  # of what is between the fingers, metres
    slack: Float64Array  # (2,) tolerance across and along the finger axis


def _pieces(bounds: Float64Array, across: float, height: float) -> list[tuple[float, float]]:
    """Intervals along the finger axis that closing pads would meet: one of a solid object, two walls of a bowl."""
    low, high = bounds[:, 0], bounds[:, 1]
    met = (np.abs(np.clip(across, low[:, 0], high[:, 0]) - across) <= PAD_HALF) & (
        np.abs(np.clip(height, low[:, 2], high[:, 2]) - height) <= PAD_HALF
    )
    pieces: list[tuple[float, float]] = []
    for near, far in sorted(zip(low[met, 1].tolist(), high[met, 1].tolist(), strict=True)):
        if pieces and near <= pieces[-1][1] + SLACK_MARGIN:
            pieces[-1] = (pieces[-1][0], max(far, pieces[-1][1]))
        else:
            pieces.append((near, far))
    return pieces


def _plan_grasp(state: PrivilegedState, goal: Goal, place: _Place) -> _Grasp:
    """The grasp with room for the hand that turns it least; if there is none, the one with the most room."""
    hand = _hand_yaw(state)
    options: list[tuple[tuple[bool, float], _Grasp]] = []
    for yaw in sorted(TURNS, key=lambda turn: (abs(turn), abs(turn - hand))):
        options += _grasps(state, goal, place, yaw)
        fits, room = max(rank for rank, _ in options)
        if fits and room > TIGHT:
            break
    return max(options, key=lambda option: option[0])[1]


def _grasps(state: PrivilegedState, goal: Goal, place: _Place, yaw: float) -> list[tuple[tuple[bool, float], _Grasp]]:
    """The grasps of a hand turned by ``yaw``, one or one for each wall; each with its rank: it fits, and its room."""
    turn = yaw_matrix(yaw)
    bounds, others = state.bounds(goal.item, yaw), _others(state, goal.item, yaw)
    low, high = bounds[:, 0].min(0), bounds[:, 1].max(0)
    middle = (low + high) / 2
    height = max(low[2] + ABOVE_BOTTOM, high[2] - BELOW_TOP)
    pieces = _pieces(bounds, middle[0], height)
    hollow = len(pieces) > 1
    if hollow:
        height = max(low[2] + ABOVE_BOTTOM, high[2] - BELOW_RIM)
        pieces = _pieces(bounds, middle[0], height)
    grasps = []
    for near, far in pieces or [(float(low[1]), float(high[1]))]:
        width, along = far - near, (near + far) / 2
        half = float(high[0] - low[0]) / 2
        across = middle[0] + (0.0 if hollow else _dodge(others, middle[0], along, height, half))
        point = turn @ np.array([across, along, height])
        room = _room(others, np.array([across, along]), height)
        if hollow:  # which wall: the hand must also fit where the object goes
            there = place.centre @ turn[:2, :2] + np.array([across, along]) - middle[:2]
            beyond = _others(state, goal.item, yaw, place.body)
            room = min(room, _room(beyond, there, place.bottom + height - low[2]))
        strain = max(float(np.hypot(point[0] - BASE_X, point[1])) - FAR, 0.0)
        slack = np.array(
            [
                WALL_SLACK if hollow else min(SLACK_ACROSS * half, SLACK_MOST),
                np.clip((OPEN_GAP - width) / 2 - SLACK_MARGIN, SLACK_MARGIN, SLACK_MOST),
            ]
        )
        rank = (width <= WIDEST, room - strain - NEARNESS * abs(along))
        grasps.append((rank, _Grasp(point, yaw, width, slack)))
    return grasps


def _room(others: Float64Array, centre: Float64Array, height: float) -> float:
    """Metres of free space around open fingers and palm at ``centre`` (2,), negative if they would meet something."""
    rooms = [ROOM]
    for reach, lowest in ((FINGER_REACH, height - FINGERTIP_BELOW), (PALM_REACH, height + PALM_ABOVE)):
        tall = others[others[:, 1, 2] > lowest]
        gap = np.maximum(tall[:, 0, :2] - (centre + reach), (centre - reach) - tall[:, 1, :2])
        rooms.append(float(gap.max(1).min(initial=np.inf)))
    return min(rooms)


def _dodge(others: Float64Array, across: float, along: float, height: float, half: float) -> float:
    """Shift of a grasp across the finger axis that keeps the palm off taller neighbours, within the object's length."""
    tall = others[others[:, 1, 2] > height + PALM_ABOVE - SLACK_MARGIN]
    beside = tall[(tall[:, 0, 1] < along + PALM_REACH[1]) & (tall[:, 1, 1] > along - PALM_REACH[1])]
    ahead = beside[beside[:, :, 0].mean(1) > across]
    behind = beside[beside[:, :, 0].mean(1) <= across]
    reach = PALM_REACH[0] + SLACK_MARGIN
    most = float((ahead[:, 0, 0] - reach).min(initial=np.inf)) - across
    least = float((behind[:, 1, 0] + reach).max(initial=-np.inf)) - across
    shift = float(np.clip(0.0, least, most)) if least <= most else (least + most) / 2
    room = max(half - 2 * PAD_HALF, 0.0)
    return float(np.clip(shift, -room, room))


def _held(state: PrivilegedState, name: str, item: Float64Array) -> float | None:
    """How firmly the object is held, 0 not yet to 1 firmly; None if it is not between the fingers at all."""
    yaw, gap = _hand_yaw(state), state.finger_gap
    across, along, height = state.eef_position @ yaw_matrix(yaw)
    pieces = _pieces(state.bounds(name, yaw), across, height)
    hollow = len(pieces) > 1
    low, high = item
    if not low[2] - 0.005 < height < high[2] + (-WALL_DEPTH if hollow else 0.003):
        return None
    for near, far in pieces:
        width = WALL if hollow else far - near
        if abs(along - (near + far) / 2) < max(gap, far - near) / 2 and (hollow or gap > EMPTY * width):
            return float(np.clip((width + LOOSE - gap) / (LOOSE - FIRM), 0.0, 1.0))
    return None


def _reach(
    state: PrivilegedState, goal: Goal, grasp: _Grasp, item: Float64Array, surrounded: bool
) -> tuple[Float64Array, bool]:
    """Velocity (3,) towards the grasp, and whether to close the fingers.

    ``surrounded``: the object is between the fingers, so that lateral errors are small and the way down is free.
    """
    eef, gap, frame = state.eef_position, state.finger_gap, yaw_matrix(grasp.yaw)[:2, :2]
    error = (grasp.point[:2] - eef[:2]) @ frame
    turned = max(abs(_hand_yaw(state) - grasp.yaw) - YAW_SLACK, 0.0)
    off = float(np.linalg.norm(_beyond(error, grasp.slack))) + YAW_LENGTH * turned
    depth = float(item[1, 2]) - grasp.point[2]
    over = depth + FINGERTIP_BELOW + CLEARANCE  # height above the grasp at which the fingers pass over the object
    near = float(np.clip(depth / 2, *CLOSE_HEIGHT))
    closing = surrounded and gap < grasp.width + (OPEN_GAP - grasp.width) / 2
    # Fingers that are not open cannot go down over the object.
    shut = 0.0 if surrounded else float(np.clip((grasp.width + 0.01 - gap) / 0.01, 0.0, 1.0)) * over
    close = closing or (not shut and off <= CLOSE_LATERAL and abs(eef[2] - grasp.point[2]) < near)
    funnel = max(min(STEEP * off, over), shut) + SLOPE * max(off - over / STEEP, 0.0)
    others = _others(state, goal.item)
    clear = max(
        _obstacle_height(others, eef[:2], FINGER_REACH) + FINGERTIP_BELOW,
        _obstacle_height(others, eef[:2], PALM_REACH) - PALM_ABOVE,
    )
    height = grasp.point[2] + float(np.clip(clear - grasp.point[2], funnel, max(STEEP * off, funnel)))
    rise = height - eef[2]
    free = 1.0 if surrounded else float(np.clip(1.0 - (rise - 0.01) / 0.05, 0.0, 1.0))
    lateral = free * (frame @ _towards(_beyond(error, grasp.slack / 2)))
    lateral /= max(1.0, float(np.abs(lateral).max()))
    return np.array([*lateral, _speed(rise, VERTICAL_TAPER)]), close


@dataclass(frozen=True)
class _Place:
    centre: Float64Array  # (2,) where the object's middle should be
    surface: float  # height of the rim or the surface
    bottom: float  # height of the object's bottom when released
    slack: Float64Array  # (2,) lateral tolerance
    body: str | None  # what it is in or on
    done: bool  # the object is where it should be


def _plan_place(state: PrivilegedState, goal: Goal, item: Float64Array) -> _Place:
    region = state.scene.regions.get(goal.place)
    body = state.scene.body_of(goal.place)
    position = state.position(goal.item)
    half = (item[1] - item[0])[:2] / 2
    if region is not None:
        centre, size = state.region(goal.place)
    else:
        centre, size = state.position(goal.place), np.zeros(3)
    if goal.inside:
        surface = float(_extent(state, body)[1, 2]) if body is not None else float(centre[2])
        slack = np.maximum(size[:2] - half - 0.01, PLACE_SLACK)
        done = bool((np.abs(position - centre) < size).all())
        return _Place(centre[:2], surface, surface - RELEASE_IN, slack, body, done)
    surface = float(_extent(state, goal.place)[1, 2]) if region is None else float(centre[2])
    settled = bool(item[0, 2] < surface + 0.005 and np.linalg.norm((position - centre)[:2]) < 0.025)
    return _Place(centre[:2], surface, surface + RELEASE_ON, np.full(2, PLACE_SLACK), body, settled)


def _carry(state: PrivilegedState, goal: Goal, item: Float64Array, place: _Place) -> tuple[Float64Array, bool]:
    """Velocity (3,) towards the place with the object in hand, and whether to let go."""
    low, high = item
    centre, half, bottom = (low + high)[:2] / 2, (high - low)[:2] / 2, float(low[2])
    error = place.centre - centre
    off = float(np.linalg.norm(_beyond(error, place.slack)))
    hanging = state.eef_position[2] - FINGERTIP_BELOW - bottom
    lowest = min(place.bottom, place.surface + RIM_CLEARANCE - hanging) if goal.inside else place.bottom
    others = _others(state, goal.item)
    clear = _obstacle_height(others, centre, half)
    above = max(place.surface + CARRY_ABOVE, clear)
    height = min(lowest + PLACE_STEEP * off, above)
    rise = height - bottom
    lifted = float(np.clip(1.0 - (rise - LIFTED) / LIFT_TAPER, LIFT_SIDEWAYS, 1.0))
    free = float(np.clip(1.0 - (min(clear, height) - bottom) / 0.04, 0.0, 1.0))
    lateral = min(free, lifted) * _towards(_beyond(error, place.slack / 2))
    early = RELEASE_EARLY if goal.inside else CLOSE_LATERAL - RELEASE_ON
    release = off == 0.0 and bottom < lowest + early
    return np.array([*lateral, _speed(rise, VERTICAL_TAPER)]), release
