"""A stop is still, for every kind of action space: simulated on a robot that does what each entry of the action says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.openx import Conventions
from spvla.actions import KINDS, ActionSpace
from spvla.errors import InputError


def robot(position: np.ndarray, action: np.ndarray, moves: np.ndarray) -> np.ndarray:
    """Where a robot is after an action: an entry that moves adds to its position, the others are where it goes."""
    return np.where(moves, position + action, action)


@st.composite
def conventions(draw):
    """Conventions of any kind with entries of any role, some of which say for themselves how they stop."""
    kind = draw(st.sampled_from(KINDS))
    parts, moves = [], []
    for i in range(draw(st.integers(1, 8))):
        role = draw(st.sampled_from(["translation", "rotation", "gripper", "joint"]))
        stop = draw(st.sampled_from([None, "zero", "hold"]))
        parts.append({"role": role, "key": "action", "index": [i]} | ({} if stop is None else {"stop": stop}))
        by_kind = kind in ("eef_delta", "joint_delta", "joint_velocity") and role != "gripper"
        moves.append({None: by_kind, "zero": True, "hold": False}[stop])
    return {"kind": kind, "control_rate": 10, "action": parts}, np.array(moves)


@given(conventions(), st.integers(0, 2**32 - 1))
def test_a_robot_that_is_stopped_stays_where_it_is(case, seed):
    values, moves = case
    space = Conventions.read(values, "test").space("robot")
    space = ActionSpace.from_dict(space.to_dict())  # as an export or a store keeps it
    g = np.random.default_rng(seed)
    last = g.uniform(-1, 1, space.dim).astype(np.float32)
    at = robot(g.uniform(-1, 1, space.dim), last, moves)
    sent = last
    for _ in range(3):
        sent = space.stop(sent)
        np.testing.assert_array_equal(robot(at, sent, moves), at)


def test_a_base_that_drives_beside_an_arm_of_positions_stops():
    space = ActionSpace("mobile", "joint_position", 30.0, *((-1.0,) * 5, (1.0,) * 5) * 2, gripper=(2,), motions=(3, 4))
    assert space.stop(np.array([0.3, -0.2, 1.0, 0.5, -0.5], np.float32)).tolist() == pytest.approx([0.3, -0.2, 1.0, 0, 0])


def test_spaces_whose_entries_stop_differently_are_not_of_one_kind():
    values = {"kind": "joint_delta", "control_rate": 10, "action": [{"key": "a", "index": [0]}, {"key": "a", "index": [1]}]}
    mine = Conventions.read(values, "test").space("mine")
    values["action"][1]["stop"] = "hold"
    theirs = Conventions.read(values, "test").space("theirs")
    with pytest.raises(InputError, match="moving"):
        mine.require_compatible(theirs, "test")
    mine.require_compatible(ActionSpace.from_dict(mine.to_dict() | {"motions": [1, 0]}), "test")  # the same, written out


@pytest.mark.parametrize("stop", ["hold it", 0, True])
def test_other_ways_to_stop_are_refused(stop):
    with pytest.raises(InputError):
        Conventions.read({"kind": "eef_delta", "control_rate": 5, "action": [{"key": "a", "stop": stop}]}, "test")
