"""What recorded LIBERO states say about recorded images: where things are, and what else could have been asked for."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.envs.base import POINTS
from data.envs.libero.env import LiberoEnv
from data.envs.libero.expert import expert_action, scene_instructions
from data.envs.libero.goals import parse_goal
from data.envs.libero.rotations import rotation_matrix
from data.envs.libero.scene import PrivilegedState, Scene, project
from data.envs.libero.tasks import load_tasks
from spvla.actions import LIBERO

EMPTY_HAND = 0.07  # finger gap in metres from which on a hand that is not closing can be asked for something else


def image_points(states: NDArray[np.float32], scene: dict[str, Any] | None) -> NDArray[np.float32]:
    """Where :data:`POINTS` are in the images, float32 (T, 3, 2), NaN where unknown; arguments as for :func:`positions`."""
    if scene is None:
        return np.full((len(states), len(POINTS), 2), np.nan, np.float32)
    flat = positions(states, scene).reshape(-1, 3)
    return np.asarray(project(scene["camera"], flat), np.float32).reshape(len(states), len(POINTS), 2)


def positions(states: NDArray[np.float32], scene: dict[str, Any] | None) -> NDArray[np.float32]:
    """Where :data:`POINTS` are in the world, metres, float32 (T, 3, 3), NaN where unknown.

    Args:
        states: environment states, (T, E), see :meth:`~data.envs.libero.scene.PrivilegedState.to_vector`.
        scene: what :meth:`~data.envs.libero.env.LiberoEnv.scene_facts` recorded, or None.
    """
    out = np.full((len(states), len(POINTS), 3), np.nan, np.float32)
    if scene is None:
        return out
    out[:, 0] = states[:, :3]
    for k, name in ((1, scene["place"]), (2, scene["item"])):
        if name is not None:
            out[:, k] = _centres(states, scene, name)
    return out


def _centres(states: NDArray[np.float32], scene: dict[str, Any], name: str) -> NDArray[np.float32]:
    """Where the centre of a body is in the world, (T, 3)."""
    body = scene["bodies"].index(name)
    poses = states[:, 8 + 7 * body : 15 + 7 * body].astype(np.float64)
    centre = np.asarray(scene["centres"][body])
    return np.array([rotation_matrix(p[3:]) @ centre + p[:3] for p in poses], np.float32)


def other_questions(
    states: NDArray[np.float32], labels: NDArray[np.float32], facts: Mapping[str, Any], instruction: str
) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]]:
    """What else could be asked for in an episode: one image then teaches several times.

    Args:
        states: environment states, (T, E).
        labels: the expert's actions for the episode's own instruction, (T, 7).
        facts: the episode's metadata.
        instruction: what was asked for.

    Returns:
        by instruction: the expert's actions, float32 (T, 7), NaN while the hand holds, closes or lets go, and where the object
        is, in the images (T, 2) and in the world (T, 3). Empty where the store does not say which LIBERO task it was.
    """
    if facts.get("scene") is None or "suite" not in facts or "task" not in facts:
        return {}
    scene, asked = _scene(facts["suite"], facts["task"])
    free = (labels[:, LIBERO.gripper[0]] < 0) & (states[:, 7] > EMPTY_HAND)  # (T,)
    out = {}
    for text in asked:
        if text == instruction:
            continue
        goal = parse_goal(text, scene)
        actions = np.full_like(labels, np.nan)
        for t in np.flatnonzero(free):
            actions[t] = expert_action(PrivilegedState.from_vector(states[t], scene), goal)
        where = _centres(states, facts["scene"], goal.item)
        out[text] = (actions, np.asarray(project(facts["scene"]["camera"], where), np.float32), where)
    return out


@functools.cache
def _scene(suite: str, task: int) -> tuple[Scene, list[str]]:
    """A LIBERO task's scene, and what one may ask for in it."""
    with LiberoEnv(load_tasks(suite, [task])[0]) as env:
        env.reset(0)
        state = env.privileged()
    return state.scene, scene_instructions(state)
