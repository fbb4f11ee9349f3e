"""Which recorded episodes may be trained on: each simulator says, and nobody speaks for a robot."""

import pytest

from data.envs import recorded_by, training_part
from data.splits import split_episodes
from data.store import RolloutStore
from data.windows import Windows
from spvla.actions import LIBERO
from spvla.errors import InputError
from spvla.store import RolloutWriter
from tests.conftest import smooth_episode


@pytest.mark.parametrize(
    ("facts", "space", "part"),
    [
        ({"suite": "libero_goal", "init_state": 0, "task": 1}, "libero", "training"),
        ({"suite": "libero_goal", "init_state": 29, "task": 1}, "libero", "calibration"),
        ({"suite": "libero_goal", "init_state": None, "seed": 31}, "libero", None),
        ({"init_state": 25, "task": 1}, "libero", "calibration"),  # an old recording names no suite
        ({"suite": "metaworld_mt50", "init_state": 5}, "metaworld", "training"),
        ({"suite": "metaworld_mt50", "init_state": None, "seed": 25}, "metaworld", "calibration"),
        ({"suite": "metaworld_mt50", "init_state": None, "seed": 1_000}, "metaworld", None),
        ({"suite": "somebody's", "init_state": 31}, "libero", None),
        ({"init_state": 31}, "franka", None),
        ({}, "libero", None),
    ],
)
def test_each_simulator_says_what_its_episodes_are_for(facts, space, part):
    assert training_part(facts, space, "store") == part


@pytest.mark.parametrize(
    ("facts", "space"),
    [
        ({"suite": "libero_goal", "init_state": 30, "task": 1}, "libero"),
        ({"init_state": 49, "task": 1}, "libero"),
        ({"suite": "metaworld_mt50", "init_state": 30}, "metaworld"),
        ({"suite": "metaworld_mt50", "init_state": None, "seed": 49}, "metaworld"),
    ],
)
def test_evaluation_data_is_refused(facts, space):
    with pytest.raises(InputError) as error:
        training_part(facts, space, "store")
    assert error.value.code == "evaluation-data" and error.value.field == "store"


def test_initial_states_of_a_robot_are_nobodys_evaluation_data(tmp_path):
    writer = RolloutWriter(tmp_path, LIBERO)
    for k in range(10):
        episode = smooth_episode(k)
        episode.metadata = {"suite": "my_kitchen", "task": k, "init_state": 30 + k}
        writer.write(f"{k}", [episode])
    split = split_episodes(Windows([RolloutStore(writer.finalize())], history=4))
    assert len(split.train) == 8 and len(split.calibration) == 2 and split.by == "random scenes"


def test_the_main_camera_is_the_simulators():
    assert [recorded_by({}, name).camera for name in ("libero", "metaworld")] == ["agentview", "corner2"]
    assert recorded_by({}, "franka") is None
