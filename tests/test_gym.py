"""A Gymnasium environment becomes a suite by a YAML file alone: what its places mean, what is guessed, what is refused."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gymnasium", reason="Gymnasium is not installed")
import gymnasium
from gymnasium.spaces import Box, Dict, Discrete

from data.collect import collect
from data.envs import load_tasks, make_env, recorded_by, simulator, training_part
from data.envs.base import HandTracking, Perturbable
from data.envs.gym.places import Moment, Place, as_image
from data.store import RolloutStore
from eval.closed_loop import closed_loop
from spvla.actions import LIBERO
from spvla.errors import InputError
from spvla.observation import WRIST
from spvla.vlas.base import VLAOutput
from spvla.vlas.registry import load_vla
from train.distill import distill

HERE = "tests.test_gym"


class Reach(gymnasium.Env):
    """A hand in a box of 0 to 10 has to reach a goal: nested observations, a goal, a target as action, a gripper."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    observation_space = Dict({"agent": Dict({"pos": Box(0, 10, (2,))}), "desired_goal": Box(0, 10, (2,))})
    action_space: Any = Box(np.float32([0, 0, 0]), np.float32([10, 10, 0.08]))

    def __init__(self, corner=(8.0, 8.0), late=False, render_mode=None):
        self.corner, self.late, self.render_mode = np.array(corner), late, render_mode
        self.hand, self.asked = np.zeros(2), []

    def _observation(self):
        picture = np.zeros((3, 20, 24), np.uint8)
        picture[0, 0] = 200  # a red row above
        inner = {"pos": self.hand.astype(np.float32), "grip/width": np.float64(self.width), "eye": picture}
        return {"agent": inner, "desired_goal": self.goal, "mission": "go"}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.hand = self.np_random.uniform(1, 3, 2) + (options or {}).get("shift", 0)
        self.goal, self.width = self.corner + self.np_random.uniform(-1, 1, 2), 0.08
        return self._observation(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.asked.append(action)
        self.hand = self.hand + np.clip(action[:2] - self.hand, -0.4, 0.4)
        self.width = action[2]
        far = float(np.linalg.norm(self.hand - self.goal))
        info = {"distance": far, "metrics": {"is_success": np.float32(far < 0.3)}}
        return self._observation(), -far, False, False, {} if self.late and far >= 0.3 else info

    def render(self):
        return np.full((12, 16, 4), 90, np.uint8) if self.render_mode == "rgb_array" else None


class Unseeded:
    """Gym's first interface: an observation alone, one done, render(mode). It draws from numpy's global generator."""

    metadata = {"render.modes": ["rgb_array"]}  # noqa: RUF012
    observation_space = action_space = Box(-2, 2, (3,))
    rng: Any = np.random
    _max_episode_steps = 30

    def reset(self):
        self.x, self.steps = self.rng.uniform(-1, 1, 3), 0
        return self.x

    def step(self, action):
        self.x, self.steps = self.x + 0.1 * action, self.steps + 1
        good = bool(np.abs(self.x).max() < 0.1)
        cut = self.steps >= self._max_episode_steps
        return self.x, float(good), good or cut, {"TimeLimit.truncated": cut and not good}

    def render(self, mode="human"):
        return np.zeros((8, 8, 3), np.uint8) if mode == "rgb_array" else None


class Old(Unseeded):
    """The same with the method seed()."""

    def seed(self, seed=None):
        self.rng = np.random.default_rng(seed)


class Chooser(Reach):
    """One whose actions are a choice."""

    action_space = Discrete(3)


class Halved(gymnasium.ActionWrapper):
    """A wrapper with an option: its actions are shares of the inner ones."""

    def __init__(self, env, by=0.5):
        super().__init__(env)
        self.action_space = Box(env.action_space.low / by, env.action_space.high / by)
        self.by = by

    def action(self, action):
        return (action * self.by).astype(np.float32)


class Deaf(gymnasium.Wrapper):
    """An old wrapper: it takes no seed, and returns an observation alone."""

    def reset(self):
        return self.env.reset()[0]

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated or truncated, info


@dataclass
class Teacher:
    """Goes straight to the goal, which it reads from the environment's own observation."""

    action_space: object
    needs_images = False

    def reset(self, instruction):
        self.instruction = instruction

    def predict(self, observation, keep_mass=1.0):
        hand, goal = observation.obs["agent"]["pos"], observation.obs["desired_goal"]
        step = np.clip(goal - hand, -0.4, 0.4)
        return VLAOutput(np.float32([[*(hand + step), 0.08]]))


def teach(checkpoint, suite):
    return Teacher(simulator(suite).action_space)


def other(checkpoint):
    return Teacher(LIBERO)


REACH = f"""
env: {HERE}:Reach
state: [obs/agent/pos, obs/agent/grip/width]
image: obs/agent/eye
wrist_image: render
success: info/metrics/is_success
control_rate: 10
max_steps: 60
action: {{kind: eef_absolute, translation: [0, 1], gripper: [2], binary_gripper: false}}
teacher: {HERE}:teach
tasks:
  high: {{instruction: reach up, kwargs: {{corner: [8.0, 8.0]}}}}
  low: {{kwargs: {{corner: [8.0, 4.0]}}, options: {{shift: 1}}, max_steps: 40}}
"""
OLD = f"env: {HERE}:Old\ncontrol_rate: 5\naction: {{kind: eef_delta}}\nsuccess: terminated\n"
_count = iter(range(1000))


@pytest.fixture
def suite(tmp_path):
    """Writes a description under a name that no other test has."""

    def write(text, **changed):
        import yaml

        values = {**yaml.safe_load(text), **changed}
        path = tmp_path / f"own{next(_count)}.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v != "left out"}))
        return str(path)

    return write


def repeats(path):
    """Whether initial state 3 is the same after another one, which differs."""
    with make_env(load_tasks(path)[0]) as env:
        states = []
        for init_state in (3, 4, 3):
            env.reset(init_state)
            states.append(env.state().tolist())
    return states[0] == states[2] != states[1]


def play(env, actions, **start):
    env.reset(**start)
    return [env.step(a) for a in actions]


def test_tasks_and_their_own_fields(suite):
    path = suite(REACH)
    high, low = load_tasks(path)
    assert (high.suite, high.name, high.instruction, high.max_steps) == (
        f"gym_{path[-9:-5].strip('/')}",
        "high",
        "reach up",
        60,
    )
    assert (low.index, low.instruction, low.max_steps, low.init_states) == (1, "low", 40, 50)
    assert load_tasks(path, ["low"], 7)[0].max_steps == 7 and load_tasks(path, [0], 900)[0].max_steps == 60
    with make_env(high) as a, make_env(low) as b:
        a.reset(3), b.reset(3)
        np.testing.assert_allclose(b.state() - a.state(), [1, 1, 0], atol=1e-6)
    with pytest.raises(InputError) as error:
        load_tasks(path, ["sideways"])
    assert error.value.code == "unknown-task"


def test_state_pictures_and_bounds_come_from_their_places(suite):
    path = suite(REACH)
    space = simulator(path).action_space
    np.testing.assert_allclose([space.low, space.high, space.q99], [[0] * 3, [10, 10, 0.08], [10, 10, 0.08]], rtol=1e-6)
    assert (space.control_rate, space.moving, space.gripper, space.binary_gripper) == (10, (), (2,), False)
    with make_env(load_tasks(path)[0], render="full", cameras=("image", WRIST)) as env:
        env.reset(0)
        seen = env.observe()
        assert seen.images["image"].shape == (20, 24, 3) and seen.images["image"][0, 5].tolist() == [200, 0, 0]
        assert seen.images[WRIST].shape == (12, 16, 3) and seen.obs["mission"] == "go"
        np.testing.assert_allclose(seen.state, [*seen.obs["agent"]["pos"], 0.08], rtol=1e-6)
        env.step([99, -5, 1])  # clipped to the Box, which the environment insists on
        assert not isinstance(env, Perturbable | HandTracking)
        with pytest.raises(InputError):
            env.step([1, np.nan, 0])
    with pytest.raises(InputError) as error:
        make_env(load_tasks(path)[0], render="full", cameras=("frontview",))
    assert error.value.code == "unknown-camera"
    with make_env(load_tasks(suite(REACH, turn="flip", hand_position=[0, 1]))[0], render="full") as env:
        env.reset(0)
        assert env.observe().image[-1, 5].tolist() == [200, 0, 0]
        assert isinstance(env, HandTracking) and env.hand_position == (0, 1)


def test_an_initial_state_is_a_seed(suite):
    with make_env(load_tasks(suite(REACH))[0]) as env:
        starts = []
        for start in ({"init_state": 4}, {"init_state": 4, "seed": 9}, {"seed": 4}, {"init_state": 5}):
            env.reset(**start)
            starts.append(env.state().tolist())
        assert starts[0] == starts[1] == starts[2] != starts[3]
        expected = np.random.Generator(np.random.PCG64(np.random.SeedSequence(4))).uniform(1, 3, 2)
        np.testing.assert_allclose(starts[0][:2], expected, rtol=1e-6)
        for wrong in ({"init_state": 50}, {"shuffle": True}, {"instruction": "make coffee"}):
            with pytest.raises(InputError):
                env.reset(**wrong)


GOAL = np.float32([8, 8, 0.08])


@pytest.mark.parametrize(
    ("success", "ends"),
    [
        ("info/metrics/is_success", True),
        ({"value": "info/distance", "at_most": 1.6}, True),
        ({"value": "reward", "at_least": -1.6}, True),
        ({"value": "obs/agent/pos[0]", "at_least": 6.9, "at_most": 8}, True),
        ({"value": "return", "at_least": 0}, False),
        ("terminated", False),
        (None, False),
    ],
)
def test_success_by_any_value(suite, success, ends):
    with make_env(load_tasks(suite(REACH, success=success))[0]) as env:
        env.reset(0)
        done = False
        while not done and env.steps < 30:
            done = env.step([*env._made.moment.obs["desired_goal"], 0.08])
        assert (env.success, done, env.steps < 30) == (ends, ends, ends)


def test_success_that_is_told_late_or_does_not_end_an_episode(suite):
    with make_env(load_tasks(suite(REACH, kwargs={"late": True}))[0]) as env:
        play(env, [GOAL] * 3)
        assert not env.success, "not told yet"
        with pytest.raises(InputError) as error:
            play(env, [np.zeros(3)] * 60)
        assert error.value.code == "missing-key", "at the end it must be there"
    with make_env(load_tasks(suite(REACH, end_on_success=False))[0]) as env:
        env.reset(0)
        goal = [*env._made.moment.obs["desired_goal"], 0.08]
        assert not any(env.step(goal) for _ in range(30)) and env.success


def test_the_first_interface_of_gym(suite):
    path = suite(OLD)
    task = load_tasks(path)[0]
    assert task.max_steps == 30 and task.name == Path(path).stem
    with make_env(task, render="full") as env:
        env.reset(7)
        start = env.state()
        np.testing.assert_allclose(start, np.random.default_rng(7).uniform(-1, 1, 3), rtol=1e-6)
        assert env.observe().image.shape == (8, 8, 3)
        done = [env.step(np.zeros(3)) for _ in range(30)]
        assert done == [False] * 29 + [True] and not env.success, "truncated"
        env.reset(7)
        while not env.step(np.clip(-start / 0.1 / 5, -2, 2)):
            start = env.state()
        assert env.success and env.steps < 30, "terminated"
    survived = load_tasks(suite(OLD, success="survived"))[0]
    with make_env(survived) as env:
        assert play(env, [np.zeros(3)] * 30, init_state=7)[-1] and env.success


def test_without_any_seed_the_global_generators_are_seeded(suite, capsys):
    path = suite(OLD, env=f"{HERE}:Unseeded")
    assert repeats(path) and "seed: the environment takes none" in capsys.readouterr().out


def test_a_wrapper_that_takes_no_seed_hands_on_the_inner_one(suite, capsys):
    path = suite(REACH, wrappers={f"{HERE}:Deaf": None})
    assert repeats(path) and not any("seed" in line.partition(": ")[2] for line in capsys.readouterr().out.splitlines())


def test_what_is_guessed_is_told(suite, capsys):
    left = dict.fromkeys(("state", "image", "success", "control_rate", "tasks"), "left out")
    path = suite(REACH, wrist_image="left out", **left, action={"kind": "eef_absolute", "gripper": [2]})
    (task,) = load_tasks(path)
    told = [line.removeprefix(f"{path}: ").partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert told == ["state", "image", "success", "control_rate", "action", "action", "instruction"]
    assert task.description.state == ("obs/agent/pos", "obs/agent/grip/width"), "neither goals nor pictures"
    assert task.description.image == "obs/agent/eye" and task.description.success.value == "info/metrics/is_success"
    assert task.space.control_rate == 10
    load_tasks(path)
    assert not capsys.readouterr().out, "once"


def test_wrappers_and_ids(suite):
    gymnasium.register("SpvlaReach-v0", f"{HERE}:Reach", max_episode_steps=25)
    path = suite(REACH, env="SpvlaReach-v0", wrappers={f"{HERE}:Halved": {"by": 0.25}}, max_steps="left out", tasks="left out")
    (task,) = load_tasks(path)
    assert task.max_steps == 25 and task.space.high[0] == 40
    with make_env(task) as env:
        assert play(env, [np.zeros(3)] * 25)[-1], "truncated by Gymnasium"
        env.reset(0)
        env.step([20, 20, 0.1])
        assert env._made.inner.asked[-1].tolist() == pytest.approx([5, 5, 0.025])


@pytest.mark.parametrize(
    ("changed", "code", "there"),
    [
        ({"state": "obs/agent/position"}, "missing-key", "obs/agent/pos (2,) float32"),
        ({"state": "agent/pos"}, "bad-place", "obs[0:7]"),
        ({"state": "obs/mission"}, "not-numbers", "str"),
        ({"state": "obs/agent/pos[5]"}, "missing-key", "2 entries"),
        ({"image": "obs/pixels"}, "missing-key", "obs/agent/eye (3, 20, 24) uint8"),
        ({"image": "obs/agent/pos"}, "not-an-image", "(2,)"),
        ({"success": "obs/agent/pos"}, "not-one-number", "obs/agent/pos[0]"),
        ({"success": {"value": "info/distance", "above": 3}}, "unknown-field", "at_least"),
        ({"env": "left out"}, "missing-field", "env"),
        ({"action": "left out"}, "missing-field", "action"),
        ({"action": "eef_delta"}, "invalid", "mapping"),
        ({"name": "a/b"}, "invalid", "file names"),
        ({"action": {"kind": "torque"}}, "unknown-kind", "joint_velocity"),
        ({"action": {"kind": "eef_delta", "low": [0, 0]}}, "wrong-size", "3"),
        ({"action": {"kind": "eef_delta", "translation": [0, 7]}}, "invalid", "0..2"),
        ({"env": f"{HERE}:Chooser"}, "not-a-box", "Discrete(3)"),
        ({"env": "NoSuch-v0"}, "invalid", "NoSuch"),
        ({"env": "no_such_package:Env"}, "invalid", "no_such_package"),
        ({"kwargs": {"corners": 3}}, "invalid", "corners"),
        ({"max_steps": "left out", "tasks": "left out"}, "missing-field", "max_steps"),
        ({"max_step": 5}, "unknown-field", "max_steps"),
        ({"tasks": {"high": {"word": 1}}}, "unknown-field", "instruction"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_there_is(suite, changed, code, there):
    path = suite(REACH, **changed)
    with pytest.raises(InputError) as error:
        load_tasks(path)
    assert error.value.code == code and there in str(error.value) and path in str(error.value)


def test_a_success_key_that_is_not_there_yet_is_listed(suite, capsys):
    load_tasks(suite(REACH, success="info/done_well"))
    assert "info/metrics/is_success" in capsys.readouterr().out


def test_unbounded_actions_need_a_range(suite, monkeypatch):
    monkeypatch.setattr(Old, "action_space", Box(-np.inf, np.inf, (3,)))
    with pytest.raises(InputError) as error:
        load_tasks(suite(OLD))
    assert error.value.field == "action.q01"
    load_tasks(suite(OLD, action={"kind": "eef_delta", "q01": [-1] * 3, "q99": [1] * 3}))


def test_the_teacher_is_a_vla_by_name(suite):
    vla = load_vla("expert", suite=suite(REACH))
    assert isinstance(vla, Teacher)
    for changed, code in (({"teacher": "left out"}, "missing-field"), ({"teacher": f"{HERE}:other"}, "space-mismatch")):
        with pytest.raises(InputError) as error:
            load_vla("expert", suite=suite(REACH, **changed))
        assert error.value.code == code


def test_recordings_know_their_part_without_the_file(suite):
    task = load_tasks(suite(REACH))[0]
    for state, part in ((0, "training"), (25, "calibration")):
        assert training_part({"suite": task.suite, "init_state": state}, task.suite, "store") == part
    assert training_part({"suite": task.suite, "init_state": None, "seed": 3}, task.suite, "store") is None
    with pytest.raises(InputError) as error:
        training_part({"suite": task.suite, "init_state": 30}, task.suite, "store")
    assert error.value.code == "evaluation-data"
    assert recorded_by({}, task.suite).camera == "camera"
    with pytest.raises(InputError) as error:
        load_tasks(task.suite)
    assert error.value.code == "unknown-suite"


def test_gymnasiums_own_reacher_is_the_same_behind_the_file(suite):
    """Joint efforts, a reward as success, and the environment's own limit and rate."""
    pytest.importorskip("mujoco")
    action = {"kind": "joint_velocity"}
    near = {"value": "info/reward_dist", "at_least": -0.15}
    path = suite("env: Reacher-v5", state=["obs[0:4]", "obs[6:8]"], image="render", success=near, action=action)
    (task,) = load_tasks(path)
    assert (task.max_steps, task.space.control_rate, task.space.dim) == (50, 50, 2) and task.space.moving == (0, 1)
    actions = np.random.default_rng(0).uniform(-1, 1, (50, 2)).astype(np.float32)
    reference = gymnasium.make("Reacher-v5")
    with make_env(task) as env:
        for seed in range(3):
            obs, _ = reference.reset(seed=seed)
            env.reset(seed)
            for action in actions:
                np.testing.assert_array_equal(env.state(), np.float32([*obs[0:4], *obs[6:8]]))
                over = env.step(action)
                obs, _, _, truncated, info = reference.step(action)
                np.testing.assert_array_equal(env.observe().obs, obs)
                assert env.success == (info["reward_dist"] >= -0.15) and over == (env.success or truncated)
                if over:
                    break


def test_places():
    moment = Moment({"a": {"b/c": np.arange(4.0)}, "t": (1, {"x": True})}, {"n": 2}, total=7.0)
    for text, expected in (
        ("obs/a/b/c", [0, 1, 2, 3]),
        ("obs/a/b/c[1:3]", [1, 2]),
        ("obs/a/b/c[-1]", [3]),
        ("obs/t/1/x", [1]),
        ("info/n", [2]),
        ("return", [7]),
    ):
        assert Place.read(text, "here").numbers(moment, "here").tolist() == expected
    assert Place.read("obs[1:]", "here").numbers(Moment(np.arange(3)), "here").tolist() == [1, 2]
    for wrong in ("reward/x", "obs/", "", "obs[a]", "render"):
        with pytest.raises(InputError):
            Place.read(wrong, "here")


def test_pictures_of_every_form():
    colour = np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8)
    forms = (colour, colour / 255.0, colour.astype(float), [colour * 0, colour], np.dstack([colour, colour[..., :1]]))
    for form in (*forms, colour.transpose(2, 0, 1)):
        np.testing.assert_array_equal(as_image(form, "x"), colour)
    assert as_image(np.full((5, 6), 9), "x").tolist() == np.full((5, 6, 3), 9).tolist()
    for wrong in (None, np.zeros(5), np.zeros((5, 6, 7)), "x"):
        with pytest.raises(InputError):
            as_image(wrong, "x")


def test_collect_distil_and_closed_loop_run_from_the_file_alone(suite, tmp_path):
    path = suite(REACH)
    collect(path, tmp_path / "store", init_states="0-5,20-22", noise=0.3, workers=1)
    store = RolloutStore(tmp_path / "store")
    assert len(store.episodes) == 18 and store.space == simulator(path).action_space
    short = {"history": 8, "steps": 60, "gate_steps": 60, "batch_size": 64, "threads": 1}
    distill([tmp_path / "store"], tmp_path / "export", generators=["mlp"], baselines=["ridge"], **short)
    options = {"init_states": "30-32", "risk": [0.5], "timing_episodes": 0, "workers": 1, "export": str(tmp_path / "export")}
    closed_loop(path, tmp_path / "results", cells=["mlp+learned"], **options)
    summary = json.loads((tmp_path / "results" / "summary.json").read_text())
    teacher, learned = summary["rows"]
    assert summary["suite"] == store.space.name and teacher["successes"] == teacher["episodes"] == 6
    assert learned["pairs"] == 6 and learned["vla_calls_per_episode"] <= teacher["vla_calls_per_episode"]
    table = [line.split() for line in (tmp_path / "results" / "tasks.txt").read_text().splitlines()]
    assert sorted(row[2:5] for row in table[1:]) == [["high", "3", "3"], ["low", "3", "3"]]
    changed = suite(REACH, max_steps=50)
    with pytest.raises(InputError):  # results of another environment
        closed_loop(changed, tmp_path / "results", cells=["mlp+learned"], **options)
