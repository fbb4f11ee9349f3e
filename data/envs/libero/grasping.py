"""How the scripted expert grasps: where and how the hand takes hold of an object, the way there, and whether it holds it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.envs.libero.goals import Goal
from data.envs.libero.motion import (
    CLEARANCE,
    CLOSE_LATERAL,
    FINGER_REACH,
    FINGERTIP_BELOW,
    OPEN_GAP,
    PAD_HALF,
    PALM_ABOVE,
    PALM_REACH,
    VERTICAL_TAPER,
    beyond,
    clear_height,
    hand_yaw,
    obstacles,
    speed,
    towards,
)
from data.envs.libero.placing import Place
from data.envs.libero.rotations import yaw_matrix
from data.envs.libero.scene import PrivilegedState

Float64Array = NDArray[np.float64]

# Reaching.
WIDEST = 0.070  # widest thing to grasp: leaves 4 mm on both sides
TURNS = tuple(float(turn) for turn in np.deg2rad([0, 30, -30, 60, -60, 90, -90]))  # ways to turn the hand
TIGHT = -0.004  # metres of free space that do for a grasp (bounds are generous); with less the hand turns
BASE_X, FAR = -0.63, 0.69  # the arm stands here, and loses strength this far out with the hand down low
ROOM = 0.03  # more free space than this around the fingers does not make a grasp better
NEARNESS = 0.01  # metres of that space that a grasp is worth which is a metre nearer to the middle
ABOVE_BOTTOM = 0.012  # grasp at least this far above the object's bottom: fingertips must not touch the table ...
BELOW_TOP = 0.032  # ... and not deeper than this below its top: the palm must not touch the object
KNOB = 0.005  # the same for what stands out at the top of something too wide
BELOW_RIM = 0.022  # the same for a hollow object's rim
SLACK_ACROSS = 0.35  # of the object's half length: how far off a grasp may be across the finger axis ...
SLACK_MOST = 0.016  # ... and at most, in metres
WALL_SLACK = 0.008  # the same for a wall, which is curved
SLACK_MARGIN = 0.004  # along the finger axis: half of the free gap less this
STEEP = 3.0  # height over lateral distance of the funnel next to the object
SLOPE = 0.4  # of the way down from afar: flat transit
YAW_SLACK = 0.15  # radians the hand may be turned off when it goes down ...
YAW_LENGTH = 0.05  # ... and the lateral distance that one radian more counts as
CLOSE_HEIGHT = (0.006, 0.012)  # ... and once this near to the grasp height (flat, tall objects)
LOOSE, FIRM = 0.008, 0.002  # lifting ramps up while the gap falls from width + LOOSE to width + FIRM
EMPTY = 0.35  # of the width: fingers closed further than this hold nothing
WALL = 0.007  # finger gap on a hollow object's wall; its collision boxes lean, so that their bounds say nothing
HANDLE = 1.5  # times the thinnest wall's thickness, as far as bounds tell it: more than that has a handle to it
WALL_DEPTH = 0.008  # fingers closed on a wall hold it if they are this far below the rim


@dataclass(frozen=True)
class Grasp:
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


def plan_grasp(state: PrivilegedState, goal: Goal, place: Place) -> Grasp:
    """The grasp with room for the hand that turns it least; if there is none, the one with the most room."""
    hand = hand_yaw(state)
    options: list[tuple[tuple[bool, float], Grasp]] = []
    for yaw in sorted(TURNS, key=lambda turn: (abs(turn), abs(turn - hand))):
        options += _grasps(state, goal, place, yaw)
        fits, room = max(rank for rank, _ in options)
        if fits and room > TIGHT:
            break
    return max(options, key=lambda option: option[0])[1]


def _grasps(state: PrivilegedState, goal: Goal, place: Place, yaw: float) -> list[tuple[tuple[bool, float], Grasp]]:
    """The grasps of a hand turned by ``yaw``, one or one for each wall; each with its rank: it fits, and its room."""
    turn = yaw_matrix(yaw)
    bounds, others = state.bounds(goal.item, yaw), obstacles(state, goal.item, yaw)
    low, high = bounds[:, 0].min(0), bounds[:, 1].max(0)
    middle = (low + high) / 2
    height = max(low[2] + ABOVE_BOTTOM, high[2] - BELOW_TOP)
    pieces = _pieces(bounds, middle[0], height)
    hollow = len(pieces) > 1
    if hollow:
        height = max(low[2] + ABOVE_BOTTOM, high[2] - BELOW_RIM)
        pieces = _pieces(bounds, middle[0], height)
    elif pieces and pieces[0][1] - pieces[0][0] > WIDEST and (knob := _pieces(bounds, middle[0], high[2] - KNOB)):
        height, pieces = high[2] - KNOB, knob
    grasps = []
    pieces = pieces or [(float(low[1]), float(high[1]))]
    thickest = HANDLE * min(far - near for near, far in pieces)  # with a mug's handle in the hand its fingers would not close
    for near, far in pieces:
        width, along = far - near, (near + far) / 2
        half = float(high[0] - low[0]) / 2
        across = middle[0] + (0.0 if hollow else _dodge(others, middle[0], along, height, half))
        point = turn @ np.array([across, along, height])
        room = _room(others, np.array([across, along]), height)
        if hollow:  # which wall: the hand must also fit where the object goes
            there = place.centre @ turn[:2, :2] + np.array([across, along]) - middle[:2]
            beyond = obstacles(state, goal.item, yaw, place.body)
            room = min(room, _room(beyond, there, place.bottom + height - low[2]))
        strain = max(float(np.hypot(point[0] - BASE_X, point[1])) - FAR, 0.0)
        slack = np.array(
            [
                WALL_SLACK if hollow else min(SLACK_ACROSS * half, SLACK_MOST),
                np.clip((OPEN_GAP - width) / 2 - SLACK_MARGIN, SLACK_MARGIN, SLACK_MOST),
            ]
        )
        rank = (width <= min(WIDEST, thickest), room - strain - NEARNESS * abs(along))
        grasps.append((rank, Grasp(point, yaw, width, slack)))
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


def firmness(state: PrivilegedState, name: str, item: Float64Array) -> float | None:
    """How firmly the object is held, 0 not yet to 1 firmly; None if it is not between the fingers at all."""
    yaw, gap = hand_yaw(state), state.finger_gap
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


def approach(
    state: PrivilegedState, goal: Goal, grasp: Grasp, item: Float64Array, surrounded: bool
) -> tuple[Float64Array, bool]:
    """Velocity (3,) towards the grasp, and whether to close the fingers.

    ``surrounded``: the object is between the fingers, so that lateral errors are small and the way down is free.
    """
    eef, gap, frame = state.eef_position, state.finger_gap, yaw_matrix(grasp.yaw)[:2, :2]
    error = (grasp.point[:2] - eef[:2]) @ frame
    turned = max(abs(hand_yaw(state) - grasp.yaw) - YAW_SLACK, 0.0)
    off = float(np.linalg.norm(beyond(error, grasp.slack))) + YAW_LENGTH * turned
    depth = float(item[1, 2]) - grasp.point[2]
    over = depth + FINGERTIP_BELOW + CLEARANCE  # height above the grasp at which the fingers pass over the object
    near = float(np.clip(depth / 2, *CLOSE_HEIGHT))
    closing = surrounded and gap < grasp.width + (OPEN_GAP - grasp.width) / 2
    # Fingers that are not open cannot go down over the object.
    shut = 0.0 if surrounded else float(np.clip((grasp.width + 0.01 - gap) / 0.01, 0.0, 1.0)) * over
    close = closing or (not shut and off <= CLOSE_LATERAL and abs(eef[2] - grasp.point[2]) < near)
    funnel = max(min(STEEP * off, over), shut) + SLOPE * max(off - over / STEEP, 0.0)
    clear = clear_height(obstacles(state, goal.item), eef[:2])
    height = grasp.point[2] + float(np.clip(clear - grasp.point[2], funnel, max(STEEP * off, funnel)))
    rise = height - eef[2]
    free = 1.0 if surrounded else float(np.clip(1.0 - (rise - 0.01) / 0.05, 0.0, 1.0))
    lateral = free * (frame @ towards(beyond(error, grasp.slack / 2)))
    lateral /= max(1.0, float(np.abs(lateral).max()))
    return np.array([*lateral, speed(rise, VERTICAL_TAPER)]), close
