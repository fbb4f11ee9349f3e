"""Which recorded episodes may be trained on: each simulator says, and nobody speaks for a robot."""

import numpy as np
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


def test_the_documented_simulator_is_one_file_and_a_name(monkeypatch, tmp_path):
    """A Gymnasium environment by an entry point: the expert reaches every goal, from what the environment shows."""
    from importlib.metadata import EntryPoint

    import spvla.registry
    from data.envs import load_tasks, make_env, simulator
    from data.rollout import rollout
    from spvla import accelerate
    from spvla.vlas.registry import load_vla

    point = EntryPoint("point", "examples.point_simulator:PointSimulator", "spvla.envs")
    monkeypatch.setattr(spvla.registry, "entry_points", lambda group: [point] if group == "spvla.envs" else [])
    simulator.cache_clear()
    vla = load_vla("expert", suite="point_reach")
    for task in load_tasks("point_reach"):
        policy = accelerate(vla, generator="last", gate="tests.test_own_parts:EverySecond")
        with make_env(task, render="full") as env:
            result = rollout(env, policy, init_state=3, seed=0, images=True)
            again = rollout(env, policy, init_state=3, seed=1)
        assert result.episode.success and list(result.episode.images) == [env.camera]
        np.testing.assert_array_equal(result.episode.actions, again.episode.actions)
        assert policy.stats()["vla_calls"] < len(result.steps)
    simulator.cache_clear()
