"""How the scripted expert moves what no hand gets hold of: closed fingers inside its rim take it along over the table."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data.envs.libero.motion import (
    CLEARANCE,
    FINGERTIP_BELOW,
    VERTICAL_TAPER,
    clear_height,
    obstacles,
    speed,
    towards,
)
from data.envs.libero.placing import Place
from data.envs.libero.scene import PrivilegedState

Float64Array = NDArray[np.float64]

CLOSED_GAP = 0.01  # finger gap from which the hand goes down
PRESS = 0.002  # the fingertips strive for so much below the thing's bottom while they push, or they would climb its rim
ENTRY, INNER = 0.35, 0.2  # of its radius: the hand goes down so far ahead of the middle, and no further off than this
SLOPE = 0.4  # height over lateral distance of the funnel above it
PUSH_TAPER, PUSH_SPEED = 0.05, 0.8  # metres over which pushing slows down, and its speed before
SIDEWAYS = 0.5  # how much of the hand's distance to the line through the middle is made good while pushing


def push(state: PrivilegedState, name: str, item: Float64Array, place: Place) -> Float64Array:
    """Velocity (3,) that brings the round, rimmed thing called ``name`` to its place; the fingers are to be closed."""
    hand, tip = state.eef_position[:2], state.eef_position[2] - FINGERTIP_BELOW
    low, high = item
    centre, radius = (low + high)[:2] / 2, float((high - low)[:2].min()) / 2
    left = place.centre - centre
    distance = float(np.linalg.norm(left))
    ahead = left / max(distance, 1e-9)
    offset = hand - centre
    entry = ENTRY * radius * ahead - offset
    out = max(float(np.linalg.norm(entry)) - INNER * radius, 0.0)
    clear = clear_height(obstacles(state, name), hand) - FINGERTIP_BELOW
    shut = float(np.clip(1.0 - (state.finger_gap - CLOSED_GAP) / CLOSED_GAP, 0.0, 1.0))
    over = high[2] + CLEARANCE
    bottom = low[2] - PRESS
    height = bottom + (over - bottom) * (1.0 - shut) if out == 0.0 else max(over + SLOPE * out, clear)
    within = tip < high[2] and float(np.linalg.norm(offset)) < radius  # the rim is around the fingers
    if within:
        across = offset - (offset @ ahead) * ahead
        lateral = PUSH_SPEED * speed(distance, PUSH_TAPER) * ahead - SIDEWAYS * towards(across)
    else:
        free = float(np.clip(1.0 - (height - tip - 0.01) / 0.05, 0.0, 1.0)) if out else 1.0
        lateral = free * towards(entry)
    return np.array([*lateral, speed(bottom - tip if within else height - tip, VERTICAL_TAPER)])
