"""Whole plans in stores, windows of every age, the noise floor, and an export that decides between three arms."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import spvla
from data.floor import noise_floor
from data.relabel import labelled
from data.rollout import deviations, rollout
from data.store import RolloutStore
from data.windows import BatchStream, Windows
from eval.offline import offline
from spvla.actions import LIBERO
from spvla.errors import InputError
from spvla.export import load_export
from spvla.gates.floor import NoiseFloor
from spvla.gates.live import LiveGate
from spvla.generators import make_baseline
from spvla.generators.features import HistoryFeatures, feature_names, to_device
from spvla.history import UNSEEN, ActionHistory, Source
from spvla.observation import Observation
from spvla.store import RolloutWriter, read_episodes
from spvla.vlas.base import VLAOutput
from tests.chunked import PLAN, DriftingVLA, drifting_episode, drifting_store, fresh, plan, play
from train.calibrate import judge_episode
from train.distill import distill
from train.stages import Plan

DRIFT = 0.07  # ages 3 and more deviate by more than 0.2
STALE = [0.0, 0.0, 0.0, *[1.0] * (PLAN - 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return drifting_store(tmp_path_factory.mktemp("plans") / "store", DRIFT)


@pytest.fixture(scope="module")
def export_folder(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("arms") / "export"
    small = {"width": 32, "depth": 1}
    steps = {"steps": 300, "gate_steps": 300, "batch_size": 256, "threads": 1}
    distill([folder], out, vla_plan=True, history=8, mlp=small, gate=small, baselines=[], default_risk=0.1, **steps)
    return out


def test_plans_come_back_from_a_store_as_they_were(folder):
    episode, before = next(iter(read_episodes(folder))), drifting_episode(0, DRIFT)
    np.testing.assert_array_equal(episode.vla_plans, before.vla_plans)
    np.testing.assert_array_equal(episode.vla_again, before.vla_again)
    store = RolloutStore(folder)
    np.testing.assert_allclose(store.arrays["vla_plans"][7], plan(7, DRIFT), atol=1e-6)
    assert not store.unlabelled()


def test_a_plan_that_is_no_whole_number_of_actions_is_refused(tmp_path):
    episode = drifting_episode(0, DRIFT)
    episode.vla_plans = episode.vla_plans[:, :-1]
    with pytest.raises(InputError) as caught:
        RolloutWriter(tmp_path, LIBERO).write("a", [episode])
    assert (caught.value.code, caught.value.field) == ("damaged", "vla_plan")


def test_steps_kept_from_a_plan_need_a_label_as_generated_ones_do(tmp_path):
    episode = drifting_episode(0, DRIFT)
    episode.vla_actions[3] = np.nan
    writer = RolloutWriter(tmp_path, LIBERO)
    writer.write("a", [episode])
    assert RolloutStore(writer.finalize()).unlabelled()


class Clock:
    """A simulation in all but physics: the state is the number of steps; it ends after 20."""

    task = SimpleNamespace(instruction="go", max_steps=20, suite="clock")
    action_space, camera, success = LIBERO, "image", False

    def reset(self, init_state=None, seed=0, instruction=None, shuffle=False):
        self.steps = 0

    def state(self):
        return np.full(3, self.steps, np.float32)

    def observe(self):
        return Observation(None, self.state())

    def step(self, action):
        self.steps += 1
        return False


class OnTheClock(DriftingVLA):
    """Reads the time off the state, and may be off by so much."""

    def __init__(self, drift, off=0.0):
        super().__init__(drift)
        self.off = off

    def predict(self, observation, keep_mass=1.0):
        self.now = int(observation.state[0])
        out = super().predict(observation)
        out.actions[:, 2] += self.off
        return out


def test_a_recording_has_a_fresh_plan_at_every_state_and_a_second_one_where_the_policy_planned():
    vla = OnTheClock(DRIFT)
    policy = spvla.accelerate(vla, generator="plan", gate="horizon", rule={"steps": 5})
    found = rollout(Clock(), policy, init_state=None, seed=0, teacher=OnTheClock(DRIFT, off=0.1), plans=True)
    episode = found.episode
    planned = np.arange(0, 20, 5)
    assert episode.sources.tolist() == [0, 3, 3, 3, 3] * 4 and vla.asked == planned.tolist()
    kept = np.flatnonzero(episode.sources == Source.PLAN)
    plans = episode.vla_plans.reshape(20, PLAN, -1)
    for t in range(20):
        expected = plan(t, DRIFT)
        expected[:, 2] += 0.1 * (t in kept)
        np.testing.assert_allclose(plans[t], expected, atol=1e-6)
    assert np.flatnonzero(~np.isnan(episode.vla_again).any(1)).tolist() == planned.tolist()
    np.testing.assert_allclose(episode.vla_again[planned, 2], 0.1)
    off = deviations(episode, LIBERO, 0.2)
    np.testing.assert_array_equal(off, np.arange(20) % 5 >= 3, "ages 3 and 4 of each plan")


def test_relabelling_keeps_whole_plans_unless_they_differ_in_length():
    episode = drifting_episode(0, 0.0, steps=3)
    outputs = [VLAOutput(plan(t, 0.5)) for t in range(3)]
    np.testing.assert_array_equal(labelled(episode, outputs).vla_plans.reshape(3, PLAN, -1), [plan(t, 0.5) for t in range(3)])
    assert episode.vla_again is None
    assert labelled(episode, [*outputs[:2], VLAOutput(plan(2, 0.5)[:4])]).vla_plans is None
    assert labelled(episode, [VLAOutput(fresh(t)[None]) for t in range(3)]).vla_plans is None


def test_every_age_of_every_earlier_plan_is_a_candidate(folder):
    windows = Windows([RolloutStore(folder)], history=6, plans=True)
    frames = np.repeat(np.arange(45, 90), 12)  # the second episode
    ages = np.tile(np.arange(1, 13), 45)
    batch = windows.batch(frames, np.zeros(len(frames), np.int64), ages)
    step, age = frames - 45, np.minimum(ages, frames - 45)
    np.testing.assert_array_equal(batch.window.vla_age, age)
    np.testing.assert_array_equal(batch.window.plan_left, np.where(age > 0, np.maximum(PLAN - age, 0), 0))
    for row in np.flatnonzero(batch.window.plan_left):
        left = int(batch.window.plan_left[row])
        expected = plan(step[row] - age[row], DRIFT)[age[row] :]
        np.testing.assert_allclose(batch.window.plan[row, :left], expected, atol=1e-6)
        assert not batch.window.plan[row, left:].any()
    there = batch.window.plan_left > 0
    deviates = windows.space.deviation(batch.window.plan[there, 0], batch.targets[there, 0], 0.2)
    np.testing.assert_array_equal(deviates, np.array(STALE)[age[there]] > 0)


def test_recorded_windows_are_what_the_policy_saw(folder):
    windows = Windows([RolloutStore(folder)], history=6, plans=True)
    batch = windows.batch(np.arange(45))
    episode = drifting_episode(0, DRIFT)
    history = ActionHistory(LIBERO, 6, plans=True)
    for t in range(45):
        history.observe(episode.states[t])
        seen = history.window()
        for name in ("actions", "sources", "mask", "states", "vla_action", "vla_state", "vla_age", "plan_left"):
            np.testing.assert_allclose(getattr(seen, name)[0], getattr(batch.window, name)[t], atol=1e-6, err_msg=f"{name} {t}")
        left = int(seen.plan_left[0])
        np.testing.assert_allclose(seen.plan[0, :left], batch.window.plan[t, :left], atol=1e-6)
        source = Source(episode.sources[t])
        history.act(episode.actions[t], source, VLAOutput(plan(t, DRIFT)) if source == Source.VLA else None)


def test_features_of_plans_are_named_and_are_the_same_for_arrays_and_tensors(export_folder, folder):
    network = load_export(export_folder).generators["mlp"]
    config = network.config.features
    assert config.vla_plan == PLAN and feature_names(config)[-1] == "plan_left"
    window = Windows([RolloutStore(folder)], history=8, plans=True).batch(np.arange(40, 60)).window
    features = HistoryFeatures(config)
    found, again = features(window), features(to_device(window, "cpu"))
    assert found.shape == (20, len(feature_names(config)))
    torch.testing.assert_close(found, again)
    column = feature_names(config).index("plan[t+1][0]")
    np.testing.assert_array_equal(found[:, column], window.plan[:, 1, 0])


def test_batches_with_pretended_ages_are_seeded(folder):
    windows = Windows([RolloutStore(folder)], history=6, plans=True)

    def ages(seed):
        stream = BatchStream(windows, [(0, 900)], 256, seed=seed, hide=0.5, batches=2)
        return np.concatenate([b.window.vla_age for _, b in stream])

    np.testing.assert_array_equal(ages(1), ages(1))
    assert (ages(1) != ages(2)).any() and set(range(1, PLAN + 1)) <= set(ages(1).astype(int).tolist())


def test_the_noise_floor_is_that_of_the_plans(tmp_path):
    windows = Windows([RolloutStore(drifting_store(tmp_path, DRIFT, episodes=3, doubt=0.3))], history=1)
    floor = noise_floor(windows, [(45, 45), (90, 45)], 0.2)
    np.testing.assert_allclose(floor.stale, STALE)
    assert floor.fresh == pytest.approx(12 / 23), "every second one of the 23 states that were asked again is off"
    assert floor.horizon() == pytest.approx(5 / 8) and floor.horizon(3) == 0
    np.testing.assert_allclose(floor.kept, STALE)
    assert noise_floor(windows, [(45, 45)], 1.0).horizon() == 0


def test_a_floor_of_executed_plans_needs_states_that_they_led_to(tmp_path):
    episode = drifting_episode(0, DRIFT)
    episode.actions[20:, 0] += 0.1  # noise: from here on no plan is executed as it was made
    writer = RolloutWriter(tmp_path / "noisy", LIBERO)
    writer.write("a", [episode])
    windows = Windows([RolloutStore(writer.finalize())], history=1)
    np.testing.assert_allclose(noise_floor(windows, [(0, 45)], 0.2).kept, STALE)
    floor = noise_floor(windows, [(21, 24)], 0.2)
    assert floor.kept is None and floor.horizon() == pytest.approx(5 / 8), "the plans of all states stand in for them"


def test_calibration_counts_what_the_gate_would_execute(export_folder, folder):
    """The bound's ingredients, step by step, against the gate that acts."""
    export = load_export(export_folder)
    plan_of = Plan({"data": [folder], "history": 8, "vla_plan": True}, export_folder, {}, {}, 1, 1, 2, 0.2)
    data = plan_of.rollouts
    generator, gate = make_baseline("last", data.space), export.gates["mlp"]
    first, length = data.split.calibration[2]
    lowest, deviates = judge_episode(data.seen, generator, gate, first, length, 0.2, data.space)
    batch = data.windows.batch(np.arange(first, first + length))
    proposals = np.ascontiguousarray(generator.propose(batch.window)[:, 0])
    for threshold in (0.05, 0.3, 0.7):
        learned = spvla.gates.classifier.LearnedGate(gate, threshold, data.space)
        for t in range(length):
            window = data.windows.batch(np.array([first + t])).window
            decision = learned.decide(window, proposals[t : t + 1])[0]
            assert (decision.intuitive and not decision.refused) == (lowest[t] <= threshold)
            acted = window.plan[0, 0] if decision.kept else proposals[t]
            assert bool(LIBERO.deviation(acted, fresh(t), 0.2)) == deviates[t]


def test_an_export_with_arms_keeps_what_holds_and_plans_again_before_it_deviates(export_folder):
    export = load_export(export_folder)
    assert export.gates["mlp"].arms
    np.testing.assert_allclose(NoiseFloor.of(export.provenance).stale, STALE)
    vla = DriftingVLA(DRIFT)
    policy = spvla.accelerate(vla, export_folder, risk=0.1, generator="mlp")
    actions = play(policy, vla, 45)
    off = LIBERO.deviation(actions, np.array([fresh(t) for t in range(45)]), 0.2)
    unseen = np.isin([s.source for s in policy.steps], UNSEEN)
    assert (off & unseen).mean() <= 0.15 and unseen.mean() > 0.4
    assert any(s.source == Source.PLAN for s in policy.steps)
    live = spvla.accelerate(vla, export_folder, risk=0.1, generator="mlp", gate="live")
    play(live, vla, 45)
    assert isinstance(live.gate, LiveGate) and live.gate.reads_plan and len(vla.asked) < 45


def test_arms_plan_again_below_the_stale_floor_and_a_policy_without_them_is_refused(export_folder, folder, tmp_path):
    vla, export = DriftingVLA(DRIFT), load_export(export_folder)
    spvla.accelerate(vla, export, risk=0.1)
    doubtful = {**export.provenance, "noise_floor": NoiseFloor(tuple(STALE), 0.12).to_dict()}
    with pytest.raises(InputError) as caught:
        spvla.accelerate(vla, replace(export, provenance=doubtful), risk=0.1)
    assert caught.value.code == "below-floor"
    small = {"width": 4, "depth": 1}
    distill([folder], tmp_path / "e", generators=[], baselines=["ridge"], gate=small, history=6, gate_steps=2, default_risk=0.2)
    with pytest.raises(InputError) as caught:
        spvla.accelerate(vla, tmp_path / "e", risk=0.6)
    assert caught.value.code == "below-floor"
    spvla.accelerate(vla, tmp_path / "e", risk=0.63)


def test_stores_without_plans_cannot_train_arms(store_folder, tmp_path):
    with pytest.raises(InputError) as caught:
        distill([store_folder], tmp_path / "e", vla_plan=True)
    assert (caught.value.code, caught.value.field) == ("missing-feature", "vla_plans")


def test_offline_judges_the_arm_that_would_act_and_says_what_the_floor_is(export_folder, folder, tmp_path, capsys):
    offline(folder, export_folder, tmp_path / "out", generators=["mlp"], risk=[0.1])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["noise_floor"]["stale"] == pytest.approx(STALE)
    (row,) = summary["rows"]
    assert row["skipped"] > 0 and "noise floor" in capsys.readouterr().out
