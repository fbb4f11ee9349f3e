"""What the names of an action's entries say: positions, velocities, changes or efforts, of joints, an end effector or grippers.

A name is read word by word (``delta_joint_0``, ``joint0Vel``, ``arm_shoulder_pan.pos``, ``left ee/pos x``), and only words
that state what a number is count. ``joint_3`` or ``motor_1`` state which motor is meant, not what is commanded: whether a
robot stands still when the last such number is sent again depends on that, so it is never taken from a word that merely
occurs in a name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from spvla.errors import InputError

Quantity = Literal["position", "velocity", "delta", "effort", "acceleration"]

QUANTITIES: dict[Quantity, set[str]] = {
    "position": {"pos", "position", "positions", "qpos", "angle", "angles", "absolute", "abs"},
    "velocity": {"vel", "velocity", "velocities", "qvel", "speed", "speeds", "twist"},
    "delta": {
        "delta",
        "deltas",
        "diff",
        "difference",
        "relative",
        "rel",
        "increment",
        "increments",
        "change",
        "displacement",
        "dpos",
    },
    "effort": {
        "effort",
        "efforts",
        "torque",
        "torques",
        "tau",
        "current",
        "currents",
        "force",
        "forces",
        "wrench",
        "pwm",
        "voltage",
        "load",
    },
    "acceleration": {"acc", "accel", "acceleration", "accelerations", "jerk"},
}
AXES = dict.fromkeys(("x", "y", "z", "dx", "dy", "dz"), "translation") | dict.fromkeys(
    ("roll", "pitch", "yaw", "rx", "ry", "rz", "droll", "dpitch", "dyaw"), "rotation"
)
DELTA_AXES = {"dx", "dy", "dz", "droll", "dpitch", "dyaw"}
PLACES = {
    "left",
    "right",
    "l",
    "r",
    "eef",
    "ee",
    "tcp",
    "end",
    "effector",
    "endeffector",
    "tool",
    "hand",
    "cartesian",
    "pose",
    "arm",
    "robot",
    "action",
    "target",
    "cmd",
    "command",
    "goal",
}
_JOINED = re.compile(r"(?i)(delta|joints?|motors?|gripper)")  # words that names join to others: deltaJoint, jointpos
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


@dataclass(frozen=True)
class Named:
    """What one name says.

    Args:
        role: translation, rotation, gripper or joint.
        quantity: what is commanded, or None where the name does not say.
        clear: it says one thing only; ``delta`` of a position is one.
    """

    role: str
    quantity: Quantity | None
    clear: bool = True


@dataclass(frozen=True)
class ActionNames:
    """What all names of an action say together.

    Args:
        kind: one of :data:`spvla.actions.KINDS`, or None where the names do not say: ``joint_0``, ``left_waist``.
        roles: of each entry.
        motions: the entries that are velocities or changes.
    """

    kind: str | None
    roles: tuple[str, ...]
    motions: tuple[int, ...]


def words(name: str) -> list[str]:
    """The words of a name, in lower case: split at punctuation, at digits and at capitals."""
    return [w.lower() for w in _WORD.findall(_JOINED.sub(r" \1 ", name))]


def read_name(name: str) -> Named:
    """What the name of one entry says."""
    found = words(name)
    quantities: set[Quantity] = {q for q, known in QUANTITIES.items() if known & set(found)}
    if DELTA_AXES & set(found):
        quantities.add("delta")
    if quantities == {"delta", "position"}:  # the change of a position
        quantities = {"delta"}
    quantity = next(iter(quantities)) if len(quantities) == 1 else None
    clear = len(quantities) <= 1
    if any("grip" in w for w in found):
        return Named("gripper", quantity, clear)
    axes = [w for w in found if w in AXES]
    stated = set().union(*QUANTITIES.values())
    others = [w for w in found if w not in AXES and w not in stated and w not in PLACES and not w.isdigit()]
    role = AXES[axes[0]] if len(axes) == 1 and not others else "joint"  # wrist_roll is a joint
    return Named(role, quantity, clear)


def read_names(names: Sequence[str]) -> ActionNames:
    """What the names of all entries of an action say.

    Raises:
        InputError: efforts and accelerations, for which no action is known that keeps a robot where it is; a name that says
            two things; names of which only some say what they are.
    """
    found = [read_name(name) for name in names]
    for name, named in zip(names, found, strict=True):
        if not named.clear:
            raise _refused(f"{name!r} gives one number two different meanings", "unclear-names")
        if named.quantity == "acceleration" or (named.quantity == "effort" and named.role != "gripper"):
            what = "an acceleration" if named.quantity == "acceleration" else "an effort (torque, force, current)"
            raise _refused(
                f"{name!r} is {what}: repeating it drives the robot on, and zero lets an arm fall, so there is no action that "
                "stops it; convert the positions or velocities instead, if the data has them",
                "effort-actions",
            )
    rest = [n for n in found if n.role != "gripper"]
    if not rest:
        raise _refused(f"there is nothing but grippers in {', '.join(names)}", "unclear-names")
    quantities = {n.quantity for n in rest}
    if None in quantities and len(quantities) > 1:
        silent = [name for name, n in zip(names, found, strict=True) if n.role != "gripper" and n.quantity is None]
        raise _refused(f"{', '.join(map(repr, silent))} do not say what they are, though others do", "unclear-names")
    cartesian = all(n.role in ("translation", "rotation") for n in rest) and quantities in ({"position"}, {"delta"}, {None})
    roles = tuple(n.role if cartesian or n.role == "gripper" else "joint" for n in found)
    motions = tuple(i for i, n in enumerate(found) if n.quantity in ("velocity", "delta"))
    if quantities == {None}:
        return ActionNames(None, roles, motions)
    if "position" in quantities:
        kind = "eef_absolute" if cartesian else "joint_position"
    elif quantities == {"delta"}:
        kind = "eef_delta" if cartesian else "joint_delta"
    elif quantities == {"velocity"}:
        kind = "joint_velocity"
    else:
        raise _refused("some entries are velocities and some are changes", "unclear-names")
    return ActionNames(kind, roles, motions)


def _refused(what: str, code: str) -> InputError:
    return InputError(what, code=code, field="features.action.names")
