"""How the scripted expert turns a knob: it takes hold of the knob's ridge and turns the hand."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data.envs.libero.motion import (
    CLEARANCE,
    FINGERTIP_BELOW,
    OPEN_GAP,
    VERTICAL_TAPER,
    clear_height,
    command,
    hand_yaw,
    obstacles,
    speed,
    towards,
)
from data.envs.libero.scene import PrivilegedState

Float64Array = NDArray[np.float64]

RIDGE = 0.006  # what reaches so near to a knob's highest point is its ridge
DEEP = 0.020  # fingertips below the ridge's highest point
NEAR = 0.010  # height above the grasp from which the fingers close
SLACK = 0.008  # lateral tolerance of the hand that goes down
TURNED, TURN_LENGTH = 0.15, 0.05  # radians that it may be turned off then, and the distance that one more counts as
STEEP, SLOPE = 3.0, 0.4  # height over lateral distance of the funnel above the ridge, and from afar
HELD = 0.006  # a finger gap of no more than this beyond the ridge's width holds it
AHEAD = 0.4  # radians that the turning hand strives for beyond where it is


def ridge(state: PrivilegedState, name: str) -> tuple[Float64Array, Float64Array, float]:
    """A knob's ridge: its middle (3,) at its highest, half its length as a vector (3,), and half its width, metres."""
    boxes, rotation = state.scene.boxes[state.scene.names.index(name)], state.rotation(name)
    tops = boxes[:, :, 2].max(1)
    corners = boxes[tops > tops.max() - RIDGE].reshape(-1, 3)
    low, high = corners.min(0), corners.max(0)
    half, along = (high - low) / 2, int(np.argmax((high - low)[:2]))
    middle = np.array([*(low + high)[:2] / 2, high[2]])
    return rotation @ middle + state.position(name), rotation[:, along] * half[along], float(half[1 - along])


def turn_on(state: PrivilegedState, name: str) -> Float64Array:
    """The action (7,) that turns the knob called ``name`` on."""
    part = state.scene.parts[name]
    sense = float(np.sign((state.rotation(part.parent) @ part.axis)[2]))
    middle, half, width = ridge(state, name)
    yaw = float(np.arctan2(half[1], half[0]))
    yaw -= np.pi * round(yaw / np.pi)  # a ridge has two ends, and the hand turns the least
    hand, tip, gap = state.eef_position[:2], state.eef_position[2] - FINGERTIP_BELOW, state.finger_gap
    bottom, over = middle[2] - DEEP, middle[2] + CLEARANCE
    error = middle[:2] - hand
    off = max(float(np.linalg.norm(error)) - SLACK, 0.0) + TURN_LENGTH * max(abs(hand_yaw(state) - yaw) - TURNED, 0.0)
    around = tip < middle[2] - NEAR / 2 and float(np.linalg.norm(error)) < 2 * SLACK
    if around and gap < 2 * width + HELD:
        hold = np.array([*towards(error), speed(bottom - tip, VERTICAL_TAPER)])
        return command(state, hold, hand_yaw(state) + sense * AHEAD, close=True)
    close = around and (tip < bottom + NEAR or gap < OPEN_GAP - HELD)
    shut = 0.0 if around else float(np.clip((2 * width + 0.02 - gap) / 0.01, 0.0, 1.0)) * (over - bottom)
    clear = clear_height(obstacles(state, name), hand) - FINGERTIP_BELOW
    funnel = max(min(STEEP * off, over - bottom), shut)
    height = bottom + (funnel if off < (over - bottom) / STEEP else max(funnel + SLOPE * off, clear - bottom))
    free = float(np.clip(1.0 - (height - tip - 0.01) / 0.05, 0.0, 1.0))
    return command(state, np.array([*(free * towards(error)), speed(height - tip, VERTICAL_TAPER)]), yaw, close)
