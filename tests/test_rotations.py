"""Differences of rotations: the turn from one step to the next, in whatever form and range it was recorded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from data.conversions import apply, wrap
from data.evidence import contradictions
from data.openx import Conventions, Field
from spvla.actions import ActionSpace
from spvla.errors import InputError
from spvla.store import Episode, RolloutWriter


@st.composite
def turning(draw, turn: float):
    """Small turns (T, 3) and the angles they add up to, from anywhere."""
    g = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    turns = g.uniform(-0.2 * turn, 0.2 * turn, (draw(st.integers(1, 40)), 3))
    return turns, np.concatenate([np.zeros((1, 3)), turns.cumsum(0)]) + g.uniform(-turn, turn, 3)


@given(turning(2 * np.pi), st.floats(-20, 20))
def test_the_difference_of_angles_recorded_modulo_a_turn_is_the_true_one(case, start):
    """Whatever window of one turn the angles are recorded in."""
    turns, angles = case
    recorded = (np.mod(angles - start, 2 * np.pi) + start).astype(np.float32)
    out = apply("rotation", ["difference"], recorded)
    np.testing.assert_allclose(out[:-1], turns, atol=1e-5)
    assert np.isnan(out[-1]).all()


@given(turning(360.0))
def test_degrees_turn_at_360(case):
    turns, angles = case
    recorded = np.mod(angles, 360.0).astype(np.float32)
    for order in (["degrees", "difference"], ["difference", "degrees"]):
        np.testing.assert_allclose(apply("rotation", order, recorded)[:-1], turns, atol=1e-3)


def test_translations_and_joints_are_numbers():
    far = np.array([[0.0], [6.2], [-6.2]], np.float32)
    for role in ("translation", "joint"):
        np.testing.assert_allclose(apply(role, ["difference"], far)[:-1], [[6.2], [-12.4]], rtol=1e-6)


def test_small_differences_stay_the_very_same_numbers():
    g = np.random.default_rng(0)
    x = g.normal(0, 1e-6, (200, 3)).astype(np.float32)
    np.testing.assert_array_equal(apply("rotation", ["difference"], x)[:-1], x[1:] - x[:-1])


@pytest.mark.parametrize(
    ("angle", "expected"), [(np.pi, np.pi), (-np.pi, np.pi), (3.5, 3.5 - 2 * np.pi), (-13.0, -13 + 4 * np.pi)]
)
def test_wrapped_angles_lie_above_minus_half_a_turn_up_to_half(angle, expected):
    assert wrap(np.float64(angle), 2 * np.pi) == pytest.approx(expected, abs=1e-6)


def walk(seed: int, steps: int = 30) -> tuple[Rotation, np.ndarray]:
    """Rotations that each turn the last one about its own axes by less than a right angle, and those turns."""
    g = np.random.default_rng(seed)
    turns, at = g.uniform(-0.8, 0.8, (steps, 3)), Rotation.random(random_state=seed)
    out = [at]
    for turn in turns:
        at = at * Rotation.from_rotvec(turn)
        out.append(at)
    return Rotation.concatenate(out), turns


@pytest.mark.parametrize("seed", range(5))
def test_rotation_vectors_and_quaternions_are_composed(seed):
    rotations, turns = walk(seed)
    flipped = rotations.as_quat() * np.random.default_rng(seed).choice([-1, 1], (31, 1))  # q and -q: the same rotation
    w_first = np.roll(flipped, 1, axis=1)
    for convert, recorded in (
        (["axis_angle", "difference"], rotations.as_rotvec()),
        (["difference_rotvec"], rotations.as_rotvec()),
        (["difference_quaternion"], flipped),
        (["difference_quaternion_wxyz"], w_first),
    ):
        out = apply("rotation", convert, recorded.astype(np.float32))
        assert out.shape == (31, 3)
        np.testing.assert_allclose(out[:-1], turns, atol=2e-5)


@pytest.mark.parametrize(
    ("index", "convert"),
    [((3, 4, 5, 6), ("difference",)), ((3, 4, 5), ("difference_quaternion",)), ((0, 1, 2), ("quaternion_to_euler",))],
)
def test_forms_that_do_not_fit_are_refused(index, convert):
    with pytest.raises(InputError) as error:
        Field("rotation", "state", index, convert)
    assert error.value.code == "rotation-form"


def test_a_quaternion_is_three_entries_of_the_action_and_costs_the_last_step():
    parts = (Field("rotation", "pose", (0, 1, 2, 3), ("difference_quaternion",)), Field("gripper", "open", (0,)))
    conventions = Conventions("eef_delta", 10.0, parts)
    space = conventions.space("arm")
    assert (space.dim, space.rotation, space.gripper, conventions.has_difference) == (4, (0, 1, 2), (3,), True)


def store_of(folder: Path, kind: str, values: np.ndarray, **roles) -> Path:
    """A measured store of one action entry, episodes (E, T)."""
    space = ActionSpace("arm", kind, 10.0, (-1.0,), (1.0,), (-1.0,), (1.0,), **roles)
    writer = RolloutWriter(folder, space, measured=True)
    for k, x in enumerate(values):
        writer.write(f"job-{k}", [Episode(x[:, None].astype(np.float32), "turn", np.arange(len(x)) / 10)])
    return writer.finalize()


def test_angles_recorded_within_one_turn_are_noted_with_count_and_episode(tmp_path):
    angles = np.array([np.linspace(0, 1, 50), np.linspace(2.5, 4.5, 50), np.linspace(-2, -4, 50)])
    wrapped = (angles + np.pi) % (2 * np.pi) - np.pi
    notes = contradictions(store_of(tmp_path / "joint", "joint_position", wrapped))
    assert len(notes) == 1 and "2 pi) 2 times, first in episode 1" in notes[0]
    notes = contradictions(store_of(tmp_path / "degrees", "joint_position", np.rad2deg(wrapped)))
    assert len(notes) == 1 and "360 degrees" in notes[0]
    deltas = store_of(tmp_path / "deltas", "eef_delta", np.diff(wrapped, axis=1), rotation=(0,))
    assert len(contradictions(deltas)) == 1


def test_what_is_no_angle_is_not_noted(tmp_path):
    millimetres = np.array([np.tile([0.0, 6.28, 12.0, 40.0], 10)])
    assert contradictions(store_of(tmp_path / "far", "joint_position", millimetres)) == []
    jump = np.array([np.tile([-3.1, 3.1], 20)])
    assert contradictions(store_of(tmp_path / "place", "eef_absolute", jump, translation=(0,))) == []
