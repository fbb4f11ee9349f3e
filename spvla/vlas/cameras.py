"""Which of the robot's cameras each image feature of somebody else's policy is, by its name.

A policy that gets the hand's image in place of the other one acts with confidence on the wrong picture, so an order is never
taken for a meaning: names are matched as a whole, and what is left over is for the user to say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from spvla.errors import InputError
from spvla.observation import MAIN, WRIST

CAMERAS = (MAIN, WRIST)  # those whose names are understood
COLOURS = 3
NAMES: dict[str, str] = {  # once words that say nothing (FILLERS) and the side of an arm are left out
    "main": MAIN,
    "primary": MAIN,
    "top": MAIN,
    "front": MAIN,
    "head": MAIN,
    "high": MAIN,
    "overhead": MAIN,
    "base": MAIN,
    "static": MAIN,
    "exterior": MAIN,
    "external": MAIN,
    "scene": MAIN,
    "agentview": MAIN,
    "agent view": MAIN,
    "third person": MAIN,
    "wrist": WRIST,
    "hand": WRIST,
    "gripper": WRIST,
    "eye in hand": WRIST,
    "in hand": WRIST,
}
EXACT = {MAIN: MAIN, WRIST: WRIST, "image2": WRIST}  # ours, and the hand's camera of LeRobot's LIBERO
FILLERS = {"image", "images", "img", "rgb", "color", "colour", "cam", "camera", "view", "robot0", "0"}
SIDES = {"left", "right"}


def camera_of(feature: str) -> str | None:
    """Which of :data:`CAMERAS` an image feature is, such as ``observation.images.top``; None where its name does not say."""
    name = feature.rpartition(".")[2]
    if name in EXACT:
        return EXACT[name]
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    told = " ".join(w for w in re.split(r"[^a-z0-9]+", words) if w not in FILLERS | SIDES)
    return NAMES.get(told)


def recorded_camera(name: str, cameras: int) -> str:
    """What one of so many recorded ``cameras`` is called in observations: ours where its name says so or it is the only one,
    else its own name."""
    return camera_of(name) or (MAIN if cameras == 1 else name)


def match_cameras(features: Mapping[str, Any], who: str, wanted: Mapping[str, str] | None = None) -> dict[str, str]:
    """Which of the robot's cameras each image feature is. A single feature whose name says nothing is the main image.

    Args:
        features: by name, with their ``shape`` (C, H, W).
        who: the policy, for messages.
        wanted: what the user says, any camera's name; None: by the names, :data:`CAMERAS` only.

    Raises:
        InputError: code ``camera-ambiguous``, naming the features and ours: names that say nothing, two for one of ours, or one
            that does not have three channels, as a depth map.
    """
    names = ", ".join(features)
    for key, ours in (wanted or {}).items():
        if key not in features or not isinstance(ours, str) or not ours:
            raise _refused(f"cameras: {key!r}: {ours!r} maps none of {names} to the name of a camera", "unknown-camera")
    found = {key: camera_of(key) for key in features} if wanted is None else dict(wanted)
    if len(features) == 1 and "depth" not in re.split(r"[^a-z0-9]+", names.lower()):
        found = {key: ours or MAIN for key, ours in found.items()}
    depth = [key for key in found if features[key].shape[0] != COLOURS]
    unknown = [key for key, ours in found.items() if ours is None]
    twice = [key for key, ours in found.items() if wanted is None and ours and list(found.values()).count(ours) > 1]
    for keys, why in (
        (depth, "has not the three channels of a colour image"),
        (unknown, "does not say which image it is"),
        (twice, "is not the only one of its kind"),
    ):
        if keys:
            raise _refused(
                f"{who}: its image features are {names}, ours are {', '.join(CAMERAS)}; {', '.join(keys)} {why}; "
                f"say which is which, for example cameras={{{next(iter(features))!r}: {MAIN!r}}}"
            )
    return {key: ours for key, ours in found.items() if ours is not None}


def _refused(message: str, code: str = "camera-ambiguous") -> InputError:
    return InputError(message, code=code, field="cameras")
