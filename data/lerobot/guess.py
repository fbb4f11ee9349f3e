"""Which conventions a LeRobot folder follows: those that are named, or what its entries' names say and all its data shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data.action_names import ActionNames, read_name, read_names
from data.evidence import Evidence
from data.lerobot.layout import Layout
from data.lerobot.times import RATE_SLACK, find_rate
from data.openx import Conventions, Field, find_conventions
from spvla.actions import FloatArray
from spvla.errors import InputError
from spvla.gripper import GripperValues, judge_grippers
from spvla.store.columns import read_vectors

OWN_CAMERA = "observation.images.image"  # of a rollout store: the main one, see spvla.Observation


def choose_conventions(layout: Layout, wanted: str | Path | None, own_space: bool) -> Conventions:
    """The conventions that were ``wanted``, a rollout store's own, or those that the names tell.

    Raises:
        InputError: nobody can tell them.
    """
    if own_space:
        state = (Field(key="observation.state"),) if "observation.state" in layout.widths else ()
        camera = OWN_CAMERA if OWN_CAMERA in layout.features else None
        return Conventions("eef_delta", 1.0, (Field(key="action"),), state, camera, None)
    robot = str(layout.info.get("robot_type"))
    if wanted is None:
        return conventions_from_names(layout)
    found = find_conventions(wanted, robot)
    rate = find_rate(layout, found.control_rate) if _rate_known(layout) else found.control_rate
    if abs(rate / found.control_rate - 1) > RATE_SLACK:
        told = f"the control rate is {rate:g} Hz in the data set, {found.control_rate:g} in the conventions"
        layout.told.append(f"{layout.path}: {told}; the conventions are used")
    tell_other_names(layout, found, wanted)
    return found


def _rate_known(layout: Layout) -> bool:
    return "timestamp" in layout.columns or bool(layout.info.get("fps"))


def action_names(layout: Layout) -> list[str] | None:
    """The names of the action's entries in ``meta/info.json``, in whichever form: a list, a list in a list, lists by group
    (``{"motors": [...]}``) or positions by name (``{"joint_0_vel": 0, ...}``). None unless there is one for each entry."""
    names: Any = (layout.features.get("action") or {}).get("names")
    if isinstance(names, dict) and names and all(isinstance(v, int) for v in names.values()):
        names = sorted(names, key=lambda name: names[name])
    if isinstance(names, dict):
        names = [n for group in names.values() for n in (group if isinstance(group, list) else [group])]
    if isinstance(names, list) and len(names) == 1 and isinstance(names[0], list):
        names = names[0]
    fits = isinstance(names, list) and len(names) == layout.widths.get("action")
    return [str(n) for n in names] if fits else None


def conventions_from_names(layout: Layout) -> Conventions:
    """What the names of the action's entries say; where they only name joints, what all the data shows.

    Raises:
        InputError: they say too little, or something that cannot be stopped.
    """
    names = action_names(layout)
    try:
        if names is None:
            stated = (layout.features.get("action") or {}).get("names")
            told = f"the action's {layout.widths.get('action')} entries are named {stated}, which does not say what they mean"
            raise InputError(told, code="unclear-names")
        named = read_names(names)
        rate = find_rate(layout)
        grippers, evidence = _look_at_all(layout, named, rate)
        kind = named.kind
        if kind is None:
            if evidence is None or not evidence.shows_positions():
                raise InputError(
                    f"the action's entries are named {', '.join(names)}, which does not say whether they are positions, "
                    "velocities or changes, and the recorded states do not show it",
                    code="unclear-names",
                )
            kind = "joint_position" if "joint" in named.roles else "eef_absolute"
            layout.told.append(
                f"{layout.path}: names such as {names[0]!r} do not say what the action is; they are taken as positions, since "
                "the state follows them in every episode"
            )
    except InputError as error:
        if error.code == "control-rate":
            raise
        how = (
            "; write a YAML file with kind, control_rate, action and state (see configs/openx) and pass it as --conventions "
            f"(robot: {layout.info.get('robot_type')})"
        )
        raise InputError(
            f"{layout.path}: {error}{how if error.code == 'unclear-names' else ''}",
            code=error.code,
            field=f"{layout.about}: features.action.names",
        ) from None
    parts = tuple(
        Field(role, "action", (i,), stop="zero" if i in named.motions else "hold") for i, role in enumerate(named.roles)
    )
    state = (Field(key="observation.state"),) if "observation.state" in layout.columns else ()
    binary = bool(grippers) and all(g.binary and g.codes and not g.passing for g in grippers)
    values = [f"{i} ({g})" for i, g in zip((i for i, r in enumerate(named.roles) if r == "gripper"), grippers, strict=False)]
    told = f"gripper {', '.join(values)}, {'binary' if binary else 'continuous'}" if values else "no gripper"
    told = f"{kind} at {rate:g} Hz, {told}"
    layout.told.append(f"{layout.path}: no conventions given; from the names in {layout.about.name}: {told}")
    return Conventions(kind, rate, parts, state, None, None, binary)


def _look_at_all(layout: Layout, named: ActionNames, rate: float) -> tuple[list[GripperValues], Evidence | None]:
    """What the grippers of all readable episodes say, and how the states of all of them follow the actions."""
    gripper = [i for i, role in enumerate(named.roles) if role == "gripper"]
    rest = [i for i in range(len(named.roles)) if i not in gripper]
    comparable = max(rest) < layout.widths.get("observation.state", 0)
    evidence = Evidence(rest, rate) if named.kind is None and comparable else None
    values: list[FloatArray] = []
    for row in layout.rows if gripper or evidence is not None else ():
        values.append(np.zeros((0, len(gripper)), np.float32))
        try:
            table = layout.table(row, ("action", "observation.state")) if row.problem is None else None
            if table is None or not table.num_rows:
                continue
            actions = read_vectors(table, "action", str(row.file))
            values[-1] = actions[:, gripper]
            if evidence is not None:
                evidence.add(actions, read_vectors(table, "observation.state", str(row.file)))
        except InputError:
            continue  # a problem that is named when the episode is read
    return judge_grippers(lambda: iter(values)) if gripper else [], evidence


def tell_other_names(layout: Layout, conventions: Conventions, wanted: str | Path) -> None:
    """Note names that say something else of an entry than the conventions, which are taken all the same."""
    names = action_names(layout) or []
    absolute = conventions.kind in ("eef_absolute", "joint_position")
    odd = []
    for part in conventions.action:
        if part.key != "action" or part.role == "gripper" or part.takes_difference:
            continue
        held = part.stop == "hold" or (part.stop is None and absolute)
        for name in names if not part.index else [names[i] for i in part.index if -len(names) <= i < len(names)]:
            quantity = read_name(name).quantity
            if quantity is not None and (quantity not in ("position",) if held else quantity not in ("velocity", "delta")):
                odd.append(f"{name!r} ({quantity})")
    if odd:
        told = f"{', '.join(odd[:3])}{' and others' if len(odd) > 3 else ''} in {layout.about.name}"
        layout.told.append(f"{layout.path}: {wanted} takes the action as {conventions.kind}, its entries are named {told}")
