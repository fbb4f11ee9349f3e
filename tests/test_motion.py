"""Motion quality against closed forms: known curves, reversals and jumps counted by hand."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.motion import MOTION, commanded, hand_over_jump, motion, motion_means, path_length, reversals, squared_jerk
from eval.report.closed_loop import cells_tables
from spvla.actions import LIBERO, ActionSpace
from spvla.history import Source
from spvla.store import Episode

RATE = 10.0
T = np.arange(40) / RATE


def space(kind, translation=(), gripper=(), dim=2, **more) -> ActionSpace:
    ends = {name: (v,) * dim for name, v in (("q01", -2.0), ("q99", 2.0), ("low", -9.0), ("high", 9.0))}
    return ActionSpace("robot", kind, RATE, translation=translation, gripper=gripper, **ends, **more)


def episode(actions, states=None, sources=None) -> Episode:
    actions = np.asarray(actions, np.float32)
    return Episode(actions, "go", np.arange(len(actions)) / RATE, states, sources)


def test_a_parabola_has_no_jerk_and_a_cubic_six_times_its_coefficient():
    parabola = np.stack([1 + 2 * T - 3 * T**2, 5 * T**2], axis=1)
    assert squared_jerk(parabola, RATE) == pytest.approx(0, abs=1e-12)
    cubic = np.stack([parabola[:, 0] + 0.5 * T**3, parabola[:, 1] - 2 * T**3], axis=1)  # jerk (3, -12), 1/s^3
    assert squared_jerk(cubic, RATE) == pytest.approx(9 + 144)


@pytest.mark.parametrize("kind", ["eef_absolute", "eef_delta", "joint_velocity"])
def test_the_same_motion_has_the_same_jerk_and_length_whatever_commands_it(kind):
    """Targets, changes per step, or velocities: positions that start at 0 and follow a cubic on a straight line."""
    way = np.outer(T + T**3, [3.0, 4.0])
    actions = {"eef_absolute": way, "eef_delta": np.diff(way, axis=0), "joint_velocity": np.diff(way, axis=0) * RATE}[kind]
    led = commanded(actions, space(kind, (0, 1)), (0, 1))
    np.testing.assert_allclose(led, way, atol=1e-9)
    assert squared_jerk(led, RATE) == pytest.approx((6 * 5) ** 2)
    assert path_length(led) == pytest.approx(5 * (T[-1] + T[-1] ** 3))


@given(st.integers(0, 10**6))
def test_jerk_of_changes_is_their_second_difference(seed):
    actions = np.random.default_rng(seed).normal(size=(9, 3))
    second = actions[2:] - 2 * actions[1:-1] + actions[:-2]
    led = commanded(actions, space("eef_delta", (0, 1, 2), dim=3), (0, 1, 2))
    assert squared_jerk(led, RATE) == pytest.approx((second**2).sum(1).mean() * RATE**6)


@pytest.mark.parametrize(
    ("commands", "kind", "motions", "count"),
    [
        ([-2, -2, 2, 2, 2, -2, -2], "eef_delta", None, 2),  # two ends: closes and opens
        ([1, 0.5, 0.1, 2, 0.3], "eef_delta", None, 0),  # stays above the middle of its range
        ([1, 0, 0, 2, 0, -1, 0, -1, 3], "eef_delta", (0, 1, 2), 2),  # a change: still is no side of its own
        ([0, 0, 0], "joint_velocity", (0, 1, 2), 0),
    ],
)
def test_gripper_reversals(commands, kind, motions, count):
    actions = np.zeros((len(commands), 3))
    actions[:, 2] = commands
    assert reversals(actions, space(kind, (0, 1), (2,), dim=3, binary_gripper=False, motions=motions)) == count


def test_two_grippers_count_together():
    sides = np.array([[-1, 1], [1, 1], [1, -1], [-1, -1]])
    assert reversals(sides, space("joint_position", (), (0, 1))) == 3


def test_the_largest_jump_at_a_hand_over():
    """Normalised, over all dimensions but the gripper's; waiting steps are the VLA's."""
    s = space("eef_delta", (0,), (2,), dim=3)
    actions = np.array([[0, 0, -2], [1, 0, 2], [1, -1.5, 2], [-9, 0, 2], [-9, 0.5, 2]])
    sources = np.array([Source.VLA, Source.GENERATOR, Source.VLA, Source.HELD, Source.GENERATOR])
    assert hand_over_jump(actions, sources, s) == pytest.approx(0.75)  # 1.5 of a half width of 2; not 10 at the waiting step
    assert hand_over_jump(actions, np.full(5, Source.GENERATOR), s) is None
    assert hand_over_jump(actions, np.array([0, 2, 2, 0, 0]), s) is None, "VLA and waiting"
    assert hand_over_jump(actions, None, s) is None


def test_any_robot_has_the_columns():
    """Joints without a hand: commanded jerk of the joints, and None for everything that nobody knows."""
    line = np.outer(T, [1.0, 2.0])
    joints = motion(episode(line), space("joint_position"), None)
    assert list(joints) == list(MOTION) and joints.pop("commanded_squared_jerk") == pytest.approx(0, abs=1e-3)
    assert set(joints.values()) == {None}
    still = motion(episode(np.zeros((1, 7))), LIBERO, (0, 1, 2))
    assert (still["path_metres"], still["squared_jerk"], still["commanded_squared_jerk"]) == (None, None, None)
    assert (still["commanded_path"], still["gripper_reversals"]) == (0, 0)
    mixed = replace(space("eef_absolute", (0, 1)), motions=(1,))
    assert motion(episode(line), mixed, None)["commanded_path"] is None
    either = replace(mixed, motions=(0, 1))  # changes, or a mobile base's velocities?
    assert motion(episode(line), either, None)["commanded_squared_jerk"] is None
    gripper_only = space("eef_delta", (), (0, 1))
    assert motion(episode(line), gripper_only, None)["commanded_squared_jerk"] is None
    gap = np.full((40, 3), np.nan, np.float32)
    assert motion(episode(line, gap), space("eef_delta", (0, 1)), (0, 1, 2))["path_metres"] is None


def test_the_hand_is_where_the_robot_says():
    """Values 1 and 3 of the state: a circle of radius 0.1 m."""
    states = np.zeros((1001, 4), np.float32)
    angle = np.linspace(0, 2 * np.pi, 1001)
    states[:, 1], states[:, 3] = 0.1 * np.cos(angle), 0.1 * np.sin(angle)
    measured = motion(episode(np.zeros((1001, 2)), states), space("eef_delta", (0, 1)), (1, 3))
    assert measured["path_metres"] == pytest.approx(0.2 * np.pi, rel=1e-4) and measured["commanded_path"] == 0


def test_means_are_over_the_episodes_that_know():
    known = dict.fromkeys(MOTION, 1.0) | {"success": True, "seconds": 4.0}
    other = dict.fromkeys(MOTION, 3.0) | {"success": False, "seconds": 9.0, "hand_over_jump": None}
    means = motion_means([known, other, {"success": True, "seconds": 2.0}])
    assert means == dict.fromkeys(MOTION, 2.0) | {"hand_over_jump": 1.0, "seconds_to_success": 3.0}
    assert set(motion_means([{"success": False, "seconds": 2.0}]).values()) == {None}


def test_the_report_has_a_table_of_motion_where_it_was_measured():
    row = {"cell": "vla", "generator": "none", "pruning": "none", "success_rate": 1.0, "skipped": 0.0}
    assert [t.title for t in cells_tables([row | {"seconds_to_success": 3.0}])] == [""]
    _, moved = cells_tables([row | {"path_metres": 0.5, "gripper_reversals": 2.0, "seconds_to_success": 3.0}])
    assert moved.title == "Motion" and "(m/s³)²" in moved.note
    assert dict(zip(moved.header, moved.rows[0], strict=True)) == {
        "cell": "VLA alone",
        "path, m": "0.500",
        "gripper reversals": "2.0",
        "seconds to success": "3.00",
    }
