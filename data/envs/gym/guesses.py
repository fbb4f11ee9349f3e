"""What a description leaves open is read from the environment itself, and every such choice is said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.envs.gym.description import AUTO, Description, Success, Variant
from data.envs.gym.made import Made, make
from data.envs.gym.places import RENDER, Moment, Place, as_image, leaves, listing
from spvla.actions import ActionSpace
from spvla.errors import InputError

SUCCESS_KEYS = ("is_success", "success", "goal_achieved", "is_goal_achieved", "task_success", "solved")  # of an info
GOALS = ("achieved_goal", "desired_goal")
MAX_STATE = 4096  # values
FEWEST_PIXELS = 16  # in height and width of an image


@dataclass(frozen=True)
class Known:
    """A description with nothing left open.

    Args:
        description: the completed one.
        space: of its actions.
        notes: what was chosen, and what will matter, a line each.
    """

    description: Description
    space: ActionSpace
    notes: tuple[str, ...]


def look_at(description: Description, where: str) -> Known:
    """Complete a description by resetting the environment of its first task, and one step.

    Raises:
        InputError: a place that is not there, or something that the environment does not say and the file must.
    """
    task = description.variant(next(iter(description.tasks)))
    made = make(description, task, where, draws=False)
    try:
        return _look(description, task, made)
    finally:
        made.close()


def _look(description: Description, task: Variant, made: Made) -> Known:
    moments = []
    for seed in (0, 0, 1):
        made.reset(seed, task.options)
        moments.append(made.moment)
    notes = _seeding(made, moments)
    description, more = _state(description, moments[0])
    notes += more
    bounded = np.isfinite(made.low) & np.isfinite(made.high)
    low, high = (np.where(bounded, bound, 0.0) for bound in (made.low, made.high))
    made.step(((low + high) / 2).astype(np.float32))
    for part in (_pictures, _success, _limit, _rate):
        description, more = part(description, task, made)
        notes += more
    space, more = _space(description, made)
    notes += more
    if all(description.variant(name).instruction is None for name in description.tasks):
        notes.append(f"instruction: none is given; the tasks' names are asked: {', '.join(description.tasks)}")
    return Known(description, space, tuple(notes))


def _seeding(made: Made, moments: Sequence[Moment]) -> list[str]:
    first, again, other = (_numbers(m.obs) for m in moments)
    if made.seeding == "global":
        start = ["seed: the environment takes none; Python's and numpy's global generators are seeded in its place"]
    else:
        start = []
    if first is not None and again is not None and not _same(first, again):
        told = "two resets with one seed differ: initial states cannot be repeated, and no comparison is paired"
        return [*start, f"seed: {told}"]
    if first is not None and other is not None and _same(first, other):
        return [*start, "seed: resets with the seeds 0 and 1 look the same: perhaps every initial state is the same"]
    return start


def _same(a: NDArray[np.float64], b: NDArray[np.float64]) -> bool:
    return a.shape == b.shape and bool(np.array_equal(a, b, equal_nan=True))


def _numbers(obs: Any) -> NDArray[np.float64] | None:
    """Everything numeric in an observation."""
    parts = [np.asarray(v).astype(np.float64).ravel() for _, v in leaves(obs, "obs") if np.asarray(v).dtype.kind in "fiub"]
    return np.concatenate(parts) if parts else None


def _is_picture(value: Any) -> bool:
    array = np.asarray(value)
    if array.ndim != 3 or array.dtype.kind not in "fu":
        return False
    return (array.shape[2] in (1, 3, 4) or array.shape[0] in (1, 3, 4)) and sorted(array.shape)[1] >= FEWEST_PIXELS


def _state(description: Description, moment: Moment) -> tuple[Description, list[str]]:
    if description.state != AUTO:
        state_of(description, moment)
        return description, []
    found = {
        place: np.asarray(value).size
        for place, value in leaves(moment.obs, "obs")
        if np.asarray(value).dtype.kind in "fiub" and np.asarray(value).ndim <= 1 and place.removeprefix("obs/") not in GOALS
    }
    description = replace(description, state=tuple(found))
    told = ", ".join(f"{place} ({size})" for place, size in found.items()) or "none; there are no vectors"
    note = f"state: not given; taken is every vector of the observation: {told}"
    state_of(description, moment)
    return description, [note]


def state_of(description: Description, moment: Moment) -> NDArray[np.float32]:
    """Proprioception (S,) at a moment.

    Raises:
        InputError: a place is not there, or holds no numbers, or too many for a state.
    """
    parts = [Place.read(place, "state").numbers(moment, "state") for place in description.state]
    state = np.concatenate([np.zeros(0), *parts]).astype(np.float32)
    if state.size > MAX_STATE:
        told = f"state: {state.size} values are more than {MAX_STATE}; is an image among {', '.join(description.state)}?"
        raise InputError(told, code="too-large", field="state")
    return state


def picture_at(place: str, camera: str, made: Made) -> NDArray[np.uint8]:
    """A camera's picture (H, W, 3) now."""
    return as_image(made.render() if place == RENDER else Place.read(place, camera).find(made.moment, camera), camera)


def _pictures(description: Description, task: Variant, made: Made) -> tuple[Description, list[str]]:
    notes: list[str] = []
    if description.image == AUTO:
        seen = [place for place, value in leaves(made.moment.obs, "obs") if _is_picture(value)]
        draws = "rgb_array" in _modes(made)
        chosen = seen[0] if seen else RENDER if draws else None
        description = replace(description, image=chosen)
        others = f" (others: {', '.join(seen[1:])})" if seen[1:] else ""
        notes.append(f"image: not given; taken is {chosen or 'none: policies that see cannot act here'}{others}")
    for camera, place in description.pictures.items():
        if place != RENDER:  # drawn only where a policy looks
            picture_at(place, camera, made)
    return description, notes


def _modes(made: Made) -> Sequence[str]:
    metadata = getattr(made.env, "metadata", None) or getattr(made.inner, "metadata", None) or {}
    modes: Sequence[str] = metadata.get("render_modes") or metadata.get("render.modes") or ()
    return modes


def _success(description: Description, task: Variant, made: Made) -> tuple[Description, list[str]]:
    there = [place for place, _ in leaves(made.moment.info, "info")]
    if description.success == AUTO:
        named = [place for key in SUCCESS_KEYS for place in there if place.rpartition("/")[2] == key]
        if not named:
            told = "success: not given, and the info names none: no episode counts as one. There is: "
            return replace(description, success=None), [told + ("; ".join(listing(made.moment.info, "info")) or "no info")]
        return replace(description, success=Success(named[0])), [f"success: not given; taken is {named[0]}"]
    if not isinstance(description.success, Success):
        return description, ["success: none; no episode counts as one"]
    try:
        description.success.holds(made.moment)
    except InputError as error:
        if error.code != "missing-key" or not description.success.value.startswith("info"):
            raise
        return description, [f"{error}. Until it is there, it counts as no success; at an episode's end it must be"]
    return description, []


def _limit(description: Description, task: Variant, made: Made) -> tuple[Description, list[str]]:
    if all(description.variant(name).max_steps is not None for name in description.tasks):
        return description, []
    limit = getattr(getattr(made.env, "spec", None), "max_episode_steps", None) or getattr(
        made.env, "_max_episode_steps", getattr(made.inner, "_max_episode_steps", None)
    )
    if not isinstance(limit, int) or limit < 1:
        told = "max_steps: the environment has no limit of its own; say how many steps an episode may take"
        raise InputError(told, code="missing-field", field="max_steps")
    return replace(description, max_steps=limit), [f"max_steps: not given; taken is the environment's own, {limit}"]


def _rate(description: Description, task: Variant, made: Made) -> tuple[Description, list[str]]:
    if description.control_rate is not None:
        return description, []
    step = getattr(made.inner, "dt", None)
    fps = (getattr(made.env, "metadata", None) or {}).get("render_fps")
    for value, source in ((1 / step if isinstance(step, float) and step > 0 else None, "dt"), (fps, "render_fps")):
        if isinstance(value, int | float) and value > 0:
            rate = round(float(value), 3)
            return replace(description, control_rate=rate), [f"control_rate: not given; taken is {rate:g} Hz, by its {source}"]
    told = "control_rate: the environment does not say it; how many control steps does the robot take in a second?"
    raise InputError(told, code="missing-field", field="control_rate")


def _space(description: Description, made: Made) -> tuple[ActionSpace, list[str]]:
    action, notes = description.action, []
    for name in ("low", "high", "q01", "q99"):
        given = getattr(action, name)
        if given is not None and len(given) != made.low.size:
            told = f"action.{name}: has {len(given)} entries, the environment's actions have {made.low.size}"
            raise InputError(told, code="wrong-size", field=f"action.{name}")
    low, high = action.low or tuple(made.low), action.high or tuple(made.high)
    if action.q01 is None or action.q99 is None:
        if not np.isfinite([*low, *high]).all():
            told = "action: its bounds are infinite; give q01 and q99, the range of the teacher's actions"
            raise InputError(told, code="missing-field", field="action.q01")
        notes.append(f"action: q01 and q99 not given; taken are the bounds, {_range(low, high)}")
    if action.gripper and action.binary_gripper is None:
        notes.append("action: binary_gripper not given; the gripper only takes its two end values")
    assert description.control_rate is not None, "completed before"
    return action.space(description.suite, description.control_rate, made.low.tolist(), made.high.tolist()), notes


def _range(low: Sequence[float], high: Sequence[float]) -> str:
    alike = len(set(low)) == 1 and len(set(high)) == 1
    return f"{low[0]:g} to {high[0]:g}" if alike else ", ".join(f"{a:g} to {b:g}" for a, b in zip(low, high, strict=True))


def require_same_box(made: Made, space: ActionSpace, description: Description) -> None:
    """Raise :class:`InputError` (code ``space-mismatch``) if a further task's actions are others than the first one's."""
    if made.low.size != space.dim:
        told = f"{made.where}: its actions have {made.low.size} entries, those of the suite's first task have {space.dim}"
        raise InputError(told, code="space-mismatch", field="tasks")
    own = description.action
    for name, given, box in (("low", own.low, made.low), ("high", own.high, made.high)):
        if given is None and not np.allclose(getattr(space, name), box):
            told = f"{made.where}: {name} is {box.tolist()}, and {list(getattr(space, name))} in the suite's first task"
            raise InputError(f"{told}; give action.{name} for all", code="space-mismatch", field=f"action.{name}")
