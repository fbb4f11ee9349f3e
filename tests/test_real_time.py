"""Waiting for a late VLA, and objects that move meanwhile: closed forms, and LIBERO's real physics."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest

from data.envs.perturb import Nudge, RealTime
from data.rollout import rollout
from spvla import accelerate
from spvla.actions import LIBERO
from spvla.errors import InputError
from spvla.history import Source
from spvla.policy import SPVLAPolicy
from spvla.recording import Recorder
from spvla.steps import StepInfo
from spvla.store import read_episodes
from spvla.vlas.registry import VLASource
from tests.conftest import ScriptedVLA

pytestmark = pytest.mark.slow  # needs a simulator, a server, a training or the clock

STATE = np.zeros(8, np.float32)


@pytest.mark.parametrize(
    ("vla_ms", "rate", "milliseconds", "delay"),
    [
        (240.0, 20.0, {"vla": 5.0, "total": 6.0}, 5),
        (240.0, 10.0, {"vla": 5.0, "total": 6.0}, 2),
        (240.0, 20.0, {"total": 0.3}, 0),  # a generated step takes what it took
        (None, 20.0, {"vla": 90.0, "capture": 30.0, "total": 125.0}, 2),  # the simulator's rendering does not count
        (None, 20.0, {"vla": 20.0, "total": 24.0}, 0),
        (0.0, 20.0, {"vla": 20.0, "total": 990.0}, 0),
    ],
)
def test_delays_are_computing_time_in_whole_control_steps(vla_ms, rate, milliseconds, delay):
    step = StepInfo(Source.VLA, False, "off", called_vla="vla" in milliseconds, milliseconds=milliseconds)
    assert RealTime(vla_ms).delay(step, replace(LIBERO, control_rate=rate)) == delay


def test_what_is_held():
    last, late = np.array([0.4, -0.3, 0.2, 0.1, 0, 0, 1], np.float32), np.full(7, -0.5, np.float32)
    np.testing.assert_array_equal(RealTime(hold="stop").held(late, last, LIBERO), [0, 0, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(RealTime(hold="last").held(late, last, LIBERO), last)
    np.testing.assert_array_equal(RealTime(hold="last").held(late, None, LIBERO), [0, 0, 0, 0, 0, 0, -0.5])
    np.testing.assert_array_equal(replace(LIBERO, kind="joint_position").stop(last), last)
    for bad in ({"hold": "go"}, {"vla_ms": -1.0}, {"vla_ms": float("nan")}):
        with pytest.raises(InputError, match="real time"):
            RealTime(**bad)


def test_steps_that_nobody_decided_are_in_the_history(tmp_path):
    actions = np.linspace(-0.6, 0.6, 21, dtype=np.float32).reshape(3, 7)
    policy = Recorder(SPVLAPolicy(ScriptedVLA(actions)), tmp_path / "store")
    with pytest.raises(InputError, match=r"call waited\(\) only after"):
        policy.waited(actions[0])
    policy.reset("wait")
    late = policy.select_action(lambda: None, state=STATE)
    policy.executed(LIBERO.stop(late))
    policy.waited(LIBERO.stop(late), STATE + 1)
    policy.waited(late, STATE + 2)
    history = policy.history
    assert history.vla_age == 3 and history.steps == 3 and not history.sources.any()
    np.testing.assert_array_equal(history.vla_action, LIBERO.normalize(late))  # what it said, when it looked
    np.testing.assert_array_equal(history.vla_state, STATE)
    np.testing.assert_array_equal(history.last_action, late)
    np.testing.assert_array_equal(policy.select_action(lambda: None, state=STATE), actions[1])
    stats = policy.stats()
    assert (stats["steps"], stats["vla_calls"], stats["held"]) == (4, 2, 2)
    policy.close()
    (episode,) = read_episodes(tmp_path / "store")
    assert episode.sources.tolist() == [Source.VLA, Source.HELD, Source.HELD, Source.VLA]


@pytest.fixture(scope="module")
def env():
    if importlib.util.find_spec("libero") is None:
        pytest.skip("LIBERO is not installed: pip install -e .[libero]")
    from data.envs import load_tasks, make_env

    with make_env(load_tasks("libero_object", [0])[0]) as env:
        yield env


def test_the_world_moves_on(env):
    actions = np.zeros((4, 7), np.float32)
    actions[:, 0], actions[:, 6] = [0.2, 0.4, 0.6, 0.8], -1
    policy = SPVLAPolicy(ScriptedVLA(actions))
    real_time = RealTime(vla_ms=100.0, hold="last")
    result = rollout(env, policy, init_state=20, seed=0, max_steps=9, real_time=real_time)
    x = result.episode.actions[:, 0]
    np.testing.assert_allclose(x, [0, 0, 0.2, 0.2, 0.2, 0.4, 0.4, 0.4, 0.6])
    assert [s.source == Source.HELD for s in result.steps] == [False, True, True] * 3
    assert [s.called_vla for s in result.steps] == [True, False, False] * 3
    moved = np.diff(result.episode.states[:, 0])
    assert abs(moved[0]) < 1e-3 < moved[-1]  # it stands until the first answer, then moves
    instant = rollout(env, policy, init_state=20, seed=0, max_steps=4, real_time=RealTime(vla_ms=0.0))
    np.testing.assert_array_equal(instant.episode.actions, actions)


def test_the_robot_moves_while_the_vla_thinks(env):
    policy = accelerate(VLASource("expert", None, {}, "libero_object").load(), "generator_libero_expert", 0.3, mode="bridge")
    teacher = VLASource("expert", None, {}, "libero_object").load()
    late = RealTime(vla_ms=200.0, mode="bridge")
    result = rollout(env, policy, init_state=20, seed=0, max_steps=30, real_time=late, teacher=teacher)
    episode = result.episode
    assert (episode.sources[:4] == Source.HELD).all() and episode.sources[4] == Source.VLA
    assert np.linalg.norm(np.diff(episode.states[:5, :3], axis=0), axis=1).max() < 2e-3, "it stands until the first answer"
    assert (episode.sources[5:] == Source.GENERATOR).sum() > 15
    asked = np.flatnonzero([s.called_vla for s in result.steps])
    due = {int(step) + 4: int(step) for step in asked}  # 200 ms are four steps
    latest, ages = None, []
    for step in range(len(episode)):
        latest = due.get(step, latest)
        ages.append(0 if latest is None else step - latest)
        if episode.sources[step] == Source.VLA:
            latest = step
    np.testing.assert_array_equal(episode.vla_ages, ages)
    assert np.isfinite(episode.vla_actions).all(), "the teacher labels every step"
    waits = accelerate(teacher, "generator_libero_expert", 0.3)
    with pytest.raises(InputError) as caught:
        rollout(env, waits, init_state=20, seed=0, max_steps=4, real_time=late)
    assert caught.value.field == "mode"


def test_an_object_is_moved_on_the_way(env):
    still = np.zeros((1, 7), np.float32)
    result = rollout(env, SPVLAPolicy(ScriptedVLA(still)), init_state=20, seed=3, max_steps=24, nudge=Nudge(0.04))
    assert result.nudged is not None and 5 <= result.nudged <= 20 and result.reaction == 0
    item = env.scene.names.index("alphabet_soup_1")
    places = result.episode.environment_states[:, 8 + 7 * item : 10 + 7 * item]
    jump = np.linalg.norm(np.diff(places, axis=0), axis=1)
    np.testing.assert_allclose(jump[result.nudged - 1], 0.04, atol=2e-3)
    assert (np.delete(jump, result.nudged - 1) < 2e-3).all()
    again = rollout(env, SPVLAPolicy(ScriptedVLA(still)), init_state=20, seed=3, max_steps=24, nudge=Nudge(0.04))
    assert again.nudged == result.nudged
    late = {"real_time": RealTime(vla_ms=240.0), "nudge": Nudge(0.04)}
    waiting = rollout(env, SPVLAPolicy(ScriptedVLA(still)), init_state=20, seed=3, max_steps=24, **late)
    assert waiting.nudged == result.nudged, "also while the robot waits"
