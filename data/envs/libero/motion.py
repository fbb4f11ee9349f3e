"""How the scripted expert moves the hand: its shape, its speeds, and what is in its way."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data.envs.libero.rotations import axis_angle, quaternion, rotation_matrix, yaw_matrix
from data.envs.libero.scene import PrivilegedState

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
CLEARANCE = 0.02  # above obstacles
OBSTACLE_SLOPE = 1.5  # height over distance of the slope that leads over an obstacle
CLOSE_LATERAL = 0.005  # fingers close this far outside the lateral slack, so that noise does not keep them open ...


def command(state: PrivilegedState, velocity: Float64Array, yaw: float, close: bool) -> Float64Array:
    """Velocity (3,), plus what levels the hand and turns it to ``yaw``, plus the gripper's command."""
    error = axis_angle(quaternion(yaw_matrix(yaw) @ LEVEL @ rotation_matrix(state.eef_quaternion).T))
    turn = np.clip(TURN_GAIN * error, -TURN_LIMIT, TURN_LIMIT)
    return np.concatenate([velocity, turn, [1.0 if close else -1.0]])


def hand_yaw(state: PrivilegedState) -> float:
    """How far the hand is turned about the vertical axis, radians."""
    fingers = rotation_matrix(state.eef_quaternion)[:, 0]
    return float(np.arctan2(-fingers[0], fingers[1]))


def speed(distance: float, taper: float) -> float:
    """Signed action for a signed distance: 1 beyond the taper, then like constant braking, proportional at the end."""
    d = abs(distance)
    return float(np.sign(distance) * min(1.0, d / np.sqrt(taper * (d + SOFT))))


def towards(error: Float64Array) -> Float64Array:
    """Lateral action (2,) straight along ``error`` (2,)."""
    distance = float(np.abs(error).max())
    return error * (speed(distance, LATERAL_TAPER) / distance) if distance > 0 else np.zeros(2)


def beyond(error: Float64Array, slack: Float64Array) -> Float64Array:
    """``error`` shortened by ``slack`` in each dimension, 0 within it."""
    return np.asarray(np.sign(error) * np.maximum(np.abs(error) - slack, 0.0))


def extent(state: PrivilegedState, name: str, yaw: float = 0.0) -> Float64Array:
    """Bounds (2, 3) of a body's collision geometry, in a frame turned by ``yaw``."""
    bounds = state.bounds(name, yaw)
    return np.stack([bounds[:, 0].min(0), bounds[:, 1].max(0)])


def obstacles(state: PrivilegedState, item: str, yaw: float = 0.0, support: str | None = None) -> Float64Array:
    """Bounds (K, 2, 3) of all that could be in the way: other objects whole, fixtures by their geoms."""
    movable = state.scene.movable
    names = [name for name in state.scene.names if name not in (item, support)]
    parts = [extent(state, name, yaw)[None] if name in movable else state.bounds(name, yaw) for name in names]
    return np.concatenate([np.empty((0, 2, 3)), *parts])


def obstacle_height(extents: Float64Array, centre: Float64Array, reach: Float64Array) -> float:
    """Height that something with half footprint ``reach`` at ``centre`` must have to pass over ``extents`` (K, 2, 3)."""
    gap = np.maximum(extents[:, 0, :2] - (centre + reach), (centre - reach) - extents[:, 1, :2])
    distance = np.linalg.norm(np.maximum(gap, 0.0), axis=1)
    return float((extents[:, 1, 2] + CLEARANCE - OBSTACLE_SLOPE * distance).max(initial=-np.inf))


def clear_height(extents: Float64Array, centre: Float64Array) -> float:
    """Height that the point between the fingertips must have for the open hand, at ``centre`` (2,), to clear ``extents``."""
    return max(
        obstacle_height(extents, centre, FINGER_REACH) + FINGERTIP_BELOW,
        obstacle_height(extents, centre, PALM_REACH) - PALM_ABOVE,
    )
