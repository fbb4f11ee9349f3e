"""How the scripted expert places what it holds: where to, the way there, and when to let go."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.envs.libero.goals import Goal
from data.envs.libero.motion import (
    CLOSE_LATERAL,
    FINGERTIP_BELOW,
    VERTICAL_TAPER,
    beyond,
    extent,
    obstacle_height,
    obstacles,
    speed,
    towards,
)
from data.envs.libero.scene import PrivilegedState

Float64Array = NDArray[np.float64]

# Placing.
CARRY_ABOVE = 0.04  # bottom of the carried object above the rim or surface, on the way
LIFTED, LIFT_TAPER, LIFT_SIDEWAYS = 0.02, 0.08, 0.25  # up first: sideways speed grows over the last metres of the rise
RELEASE_IN = 0.03  # lower it until the bottom is this far below a container's rim ...
RIM_CLEARANCE = 0.008  # ... or, if tall, further: until the fingertips are this far above the rim
RELEASE_ON = -0.005  # lower it to this height above a surface (negative: until it touches)
RELEASE_EARLY = 0.02  # into a container: the fingers open this far above the lowest point, on the way down
PLACE_STEEP = 3.0  # height over lateral distance of the funnel above the place
PLACE_SLACK = 0.012  # least lateral tolerance when releasing


@dataclass(frozen=True)
class Place:
    centre: Float64Array  # (2,) where the object's middle should be
    surface: float  # height of the rim or the surface
    bottom: float  # height of the object's bottom when released
    slack: Float64Array  # (2,) lateral tolerance
    body: str | None  # what it is in or on
    done: bool  # the object is where it should be


def plan_place(state: PrivilegedState, goal: Goal, item: Float64Array) -> Place:
    region = state.scene.regions.get(goal.place)
    body = state.scene.body_of(goal.place)
    position = state.position(goal.item)
    half = (item[1] - item[0])[:2] / 2
    if region is not None:
        centre, size = state.region(goal.place)
    else:
        centre, size = state.position(goal.place), np.zeros(3)
    if goal.inside:
        surface = float(extent(state, body)[1, 2]) if body is not None else float(centre[2])
        slack = np.maximum(size[:2] - half - 0.01, PLACE_SLACK)
        done = bool((np.abs(position - centre) < size).all())
        return Place(centre[:2], surface, surface - RELEASE_IN, slack, body, done)
    surface = float(extent(state, goal.place)[1, 2]) if region is None else float(centre[2])
    settled = bool(item[0, 2] < surface + 0.005 and np.linalg.norm((position - centre)[:2]) < 0.025)
    return Place(centre[:2], surface, surface + RELEASE_ON, np.full(2, PLACE_SLACK), body, settled)


def carry(state: PrivilegedState, goal: Goal, item: Float64Array, place: Place) -> tuple[Float64Array, bool]:
    """Velocity (3,) towards the place with the object in hand, and whether to let go."""
    low, high = item
    centre, half, bottom = (low + high)[:2] / 2, (high - low)[:2] / 2, float(low[2])
    error = place.centre - centre
    off = float(np.linalg.norm(beyond(error, place.slack)))
    hanging = state.eef_position[2] - FINGERTIP_BELOW - bottom
    lowest = min(place.bottom, place.surface + RIM_CLEARANCE - hanging) if goal.inside else place.bottom
    others = obstacles(state, goal.item)
    clear = obstacle_height(others, centre, half)
    above = max(place.surface + CARRY_ABOVE, clear)
    height = min(lowest + PLACE_STEEP * off, above)
    rise = height - bottom
    lifted = float(np.clip(1.0 - (rise - LIFTED) / LIFT_TAPER, LIFT_SIDEWAYS, 1.0))
    free = float(np.clip(1.0 - (min(clear, height) - bottom) / 0.04, 0.0, 1.0))
    lateral = min(free, lifted) * towards(beyond(error, place.slack / 2))
    early = RELEASE_EARLY if goal.inside else CLOSE_LATERAL - RELEASE_ON
    release = off == 0.0 and bottom < lowest + early
    return np.array([*lateral, speed(rise, VERTICAL_TAPER)]), release
