"""Whether a gripper is binary and where its ends are: by all episodes, in any order, on any number of workers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.evidence import contradictions
from spvla.actions import LIBERO, ActionSpace
from spvla.errors import InputError
from spvla.gripper import judge_grippers
from spvla.store import Episode, RolloutWriter, read_action_space, read_episodes

ARM = ActionSpace("arm", "joint_position", 10.0, (-1.0,) * 2, (1.0,) * 2, (-1.0,) * 2, (1.0,) * 2, gripper=(1,))


def judged(episodes):
    (found,) = judge_grippers(lambda: iter([np.asarray(e, np.float32).reshape(-1, 1) for e in episodes]))
    return found


def strokes(count: int, low: float, high: float, steps: int = 40) -> list[np.ndarray]:
    """Episodes in which the gripper closes once, at another step in each."""
    return [np.where(np.arange(steps) < 5 + k % (steps - 10), low, high) for k in range(count)]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-1, 1), (0, 255), (0.1, 0.7), (-3.5, -3.4)])
def test_two_values_are_the_ends_to_the_last_bit(low, high):
    found = judged(strokes(7, low, high))
    assert found.binary and found.codes and not found.strays
    assert (found.low, found.high) == (float(np.float32(low)), float(np.float32(high)))


@pytest.mark.parametrize("stray", [-1.0, 3.0, 0.5, 1e6, -255.0])
@pytest.mark.parametrize("at", [0, 4, 7])
def test_a_stray_code_is_no_end_in_whichever_episode_it_is(stray, at):
    episodes = strokes(8, 0.0, 1.0)
    episodes[at][10:22] = stray
    found = judged(episodes)
    assert found.binary and (found.low, found.high) == (0.0, 1.0)
    assert found.strays == {at: (stray, 12)} and not found.passing


def test_a_continuous_gripper_that_rests_in_the_first_episodes_is_continuous():
    resting = [np.zeros(50), np.ones(50), np.repeat([0.0, 1.0], 25)]
    moving = [np.clip(np.sin(np.arange(50) / 9 + k), 0, 1) for k in range(3)]
    assert not judged(resting + moving).binary


def test_three_states_are_not_two():
    """close, nothing, open: nothing is a state, not a mistake."""
    assert not judged([np.repeat([-1.0, 0.0, 1.0], [5, 40, 5])] * 6).binary


def test_a_gripper_on_its_way_between_its_ends_is_noted_not_left_out():
    episodes = [np.r_[np.zeros(100), 0.2 + 0.01 * k, np.ones(100)] for k in range(20)]
    found = judged(episodes)
    assert found.binary and found.passing and len(found.strays) == 20


@given(
    st.lists(st.lists(st.sampled_from([0.0, 1.0, 0.3, 2.0]), min_size=1, max_size=30), min_size=1, max_size=12), st.randoms()
)
def test_the_order_of_episodes_does_not_matter(episodes, random):
    shuffled = list(enumerate(episodes))
    random.shuffle(shuffled)
    one, other = judged(episodes), judged([e for _, e in shuffled])
    back = {shuffled[k][0]: v for k, v in other.strays.items()}
    assert replace(one, strays={}) == replace(other, strays={}) and one.strays == back


def record(folder: Path, grippers: list[np.ndarray], space: ActionSpace = ARM) -> Path:
    writer = RolloutWriter(folder, space, measured=True)
    for k, gripper in enumerate(grippers):
        joint = np.sin(np.arange(len(gripper)) / 5 + k)
        actions = np.stack([joint, gripper], 1).astype(np.float32)
        times = np.arange(len(gripper)) / 10
        writer.write(f"job-{k:02d}", [Episode(actions, "grip", times, metadata={"number": 100 + k})])
    return writer.finalize()


def test_a_store_leaves_the_stray_episode_out_and_says_so(tmp_path):
    grippers = strokes(6, 0.0, 1.0)
    grippers[2][30:36] = 2.0
    store = record(tmp_path / "store", grippers)
    space = read_action_space(store)
    assert (space.q01[1], space.q99[1], space.high[1]) == (0.0, 1.0, 1.0)
    episodes = list(read_episodes(store))
    assert [e.metadata["number"] for e in episodes] == [100, 101, 103, 104, 105]
    (left,) = json.loads((store / "meta" / "spvla.json").read_text())["left_out"]
    assert left["record"] == 102 and "6 steps" in left["reason"]
    info = json.loads((store / "meta" / "info.json").read_text())
    assert (info["total_episodes"], info["total_frames"]) == (5, 200)


@settings(max_examples=10)
@given(st.permutations(range(6)))
def test_shuffled_episodes_give_the_same_action_space_and_statistics(tmp_path_factory, order):
    grippers = strokes(6, 0.0, 0.04)
    grippers[5][3] = -1.0
    folder = tmp_path_factory.mktemp("stores")
    writer = RolloutWriter(folder, ARM, measured=True)
    for at, k in enumerate(order):
        actions = np.stack([np.sin(np.arange(40) / 5 + k), grippers[k]], 1).astype(np.float32)
        writer.write(f"job-{at}", [Episode(actions, "grip", np.arange(40) / 10)])
    writer.finalize()
    space = read_action_space(folder)
    reference = record(tmp_path_factory.mktemp("reference") / "store", grippers)
    assert space == read_action_space(reference)
    assert (space.q01[1], space.q99[1]) == (0.0, pytest.approx(0.04))
    mine, theirs = (json.loads((f / "meta" / "stats.json").read_text()) for f in (folder, reference))
    for name in ("mean", "std", "min", "max", "q01", "q99"):
        np.testing.assert_allclose(mine["action"][name], theirs["action"][name], rtol=1e-12)


def test_steps_between_the_ends_are_noted_with_count_and_episode(tmp_path):
    grippers = strokes(30, 0.0, 1.0, steps=100)
    for k in range(10, 20):
        grippers[k][5 + k] = 0.31 + k / 100
    (note,) = contradictions(record(tmp_path / "store", grippers))
    assert "10 steps, first in episode 10 at 0.41" in note
    assert contradictions(record(tmp_path / "clean", strokes(6, 0.0, 1.0))) == []


def test_a_claim_that_the_data_contradicts_is_refused(tmp_path):
    with pytest.raises(InputError) as error:
        record(tmp_path / "store", [np.linspace(0, 1, 40)] * 5)
    assert (error.value.code, error.value.field) == ("gripper-not-binary", "binary_gripper")
    continuous = record(tmp_path / "continuous", [np.linspace(0, 1, 40)] * 5, replace(ARM, binary_gripper=False))
    assert len(list(read_episodes(continuous))) == 5


def test_a_gripper_of_which_one_end_was_seen_stays_there():
    space = replace(LIBERO, q01=(-1.0,) * 6 + (0.4,), q99=(1.0,) * 6 + (0.4,))
    for seen in (-0.9, 0.0, 0.9):
        assert space.denormalize(space.snap_gripper(np.full(7, seen, np.float32)))[6] == np.float32(0.4)
