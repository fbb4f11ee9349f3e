"""Meta-World beside LIBERO: the same protocol, the same commands, the same process."""

import json

import numpy as np
import pytest

pytest.importorskip("metaworld", reason="Meta-World is not installed")
from data.collect import collect
from data.envs import load_tasks, make_env
from data.envs.base import HandTracking, Instructable, Perturbable, Privileged
from data.store import RolloutStore
from eval.closed_loop import closed_loop
from spvla.errors import InputError
from spvla.observation import Observation
from spvla.vlas.registry import load_vla

pytestmark = pytest.mark.slow  # needs a simulator, a server, a training or the clock

SUITE = "metaworld_mt50"


def play(env, vla, init_state=None, seed=0):
    """The expert's states and actions until success or the limit."""
    env.reset(init_state, seed)
    vla.reset(env.task.instruction)
    states, actions = [], []
    while not env.success and env.steps < env.task.max_steps:
        states.append(env.state())
        actions.append(vla.predict(env.observe()).actions[0])
        env.step(actions[-1])
    return np.array(states), np.array(actions)


def test_fifty_tasks_with_words_of_their_own():
    tasks = load_tasks(SUITE)
    assert len(tasks) == 50 and len({t.instruction for t in tasks}) == 50
    assert load_tasks(SUITE, ["door-open-v3"])[0].instruction == "door open"
    assert all(t.init_states == 50 for t in tasks)
    with pytest.raises(InputError) as error:
        load_tasks(SUITE, ["door-explode-v3"])
    assert (error.value.code, error.value.field) == ("unknown-task", "tasks")


@pytest.mark.parametrize("name", ["door-open-v3", "plate-slide-v3", "reach-v3"])
def test_the_expert_succeeds_and_an_episode_can_be_repeated(name):
    vla = load_vla("expert", suite=SUITE)
    with make_env(load_tasks(SUITE, [name])[0]) as env:
        states, actions = play(env, vla, 3)
        assert env.success and len(actions) < 200
        np.testing.assert_array_equal(play(env, vla, 3)[1], actions)
        assert np.abs(actions).max() <= 1 and actions.dtype == np.float32 and states.shape[1] == 4
        goals = [play(env, vla, i) and env.environment_state()[-3:] for i in (3, 4)]
        assert np.abs(goals[0] - goals[1]).max() > 1e-3, "another initial state has its goal elsewhere"


@pytest.mark.parametrize("suite", [SUITE, "libero_object"])
def test_the_hand_is_where_the_simulator_says(suite):
    """Ten steps upwards lift it by centimetres, and move it sideways by little."""
    if suite != SUITE:
        pytest.importorskip("libero", reason="LIBERO is not installed")
    with make_env(load_tasks(suite, [0])[0]) as env:
        assert isinstance(env, HandTracking)
        env.reset(0)
        up = np.zeros(env.action_space.dim)
        up[env.action_space.translation[2]] = 0.5
        before = env.state()[list(env.hand_position)]
        for _ in range(10):
            env.step(up)
        sideways, lifted = np.split(env.state()[list(env.hand_position)] - before, [2])
        assert 0.02 < lifted[0] < 0.2 and np.abs(sideways).max() < 0.2 * lifted[0]


def test_what_it_cannot_do_is_said():
    with make_env(load_tasks(SUITE, [0])[0]) as env:
        assert isinstance(env, Privileged) and not isinstance(env, Perturbable | Instructable)
        for wrong in ({"shuffle": True}, {"instruction": "make coffee"}):
            with pytest.raises(InputError) as error:
                env.reset(0, **wrong)
            assert error.value.code == "unsupported"
        with pytest.raises(InputError):
            env.step(np.full(4, np.nan))
    with pytest.raises(InputError):
        load_vla("expert", suite=SUITE).predict(Observation())


def test_pictures_of_two_simulators_in_one_process():
    pytest.importorskip("libero", reason="LIBERO is not installed")
    with make_env(load_tasks(SUITE, ["drawer-open-v3"])[0], render="full") as env:
        env.reset(0)
        first = env.observe().require_image()
    assert first.shape == (256, 256, 3) and first[:40].mean() > 100, "the wall is above, the robot's foot below"
    with make_env(load_tasks("libero_object", [0])[0], render="fast") as env:
        env.reset(0)
        assert 20 < env.observe().require_image().std() < 70, "no noise"


def test_the_commands_run_on_it_by_the_name_of_the_suite(tmp_path):
    collect(SUITE, tmp_path / "store", tasks=["reach-v3", "push-v3"], episodes_per_task=2, noise=0.3, workers=1)
    store = RolloutStore(tmp_path / "store")
    assert store.space.name == "metaworld" and len(store.episodes) == 4
    options = {"tasks": ["reach-v3"], "init_states": "30-31", "cells": ["ridge+release"], "timing_episodes": 0, "workers": 1}
    closed_loop(SUITE, tmp_path / "results", **options)
    for row in json.loads((tmp_path / "results" / "summary.json").read_text())["rows"]:
        assert row["successes"] == 2 and 0.05 < row["path_metres"] < 1 and row["squared_jerk"] > 0
        assert row["seconds_to_success"] == row["seconds_per_episode"] and row["gripper_reversals"] is not None
        assert (row["hand_over_jump"] is None) == (row["cell"] == "vla")


def test_a_simulator_of_ones_own_comes_in_by_an_entry_point(monkeypatch):
    from importlib.metadata import EntryPoint

    import data.envs
    import spvla.registry

    point = EntryPoint("my_sim", "data.envs.metaworld:MetaWorld", data.envs.SIMULATORS.group)
    monkeypatch.setattr(spvla.registry, "entry_points", lambda group: [point])
    data.envs.simulator.cache_clear()
    assert type(data.envs.simulator("my_sim_tasks")).__name__ == "MetaWorld"
    data.envs.simulator.cache_clear()
