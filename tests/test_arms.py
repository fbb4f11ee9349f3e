"""Keep the plan, generate, or plan again: who acts at each step, and what counts."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import spvla
from data.store import RolloutStore
from data.windows import Windows
from eval.cells import Cell, parse_cells
from eval.summary import summarise
from spvla.actions import LIBERO
from spvla.errors import InputError
from spvla.gates.base import Decisions
from spvla.gates.classifier import judge
from spvla.gates.floor import NoiseFloor
from spvla.gates.live import LiveGate, LiveOptions
from spvla.gates.plans import HorizonGate
from spvla.generators.plan import PlanGenerator
from spvla.history import ActionHistory, Source
from spvla.observation import Observation
from spvla.policy import SPVLAPolicy
from spvla.realtime import BridgePolicy, SimulatedCalls
from spvla.recording import Recorder
from spvla.store import read_episodes
from spvla.vlas.base import VLAUnavailable
from tests.chunked import PLAN, DriftingVLA, fresh, plan, play


def horizon(vla, steps, **options):
    return spvla.accelerate(vla, generator="plan", gate="horizon", rule={"steps": steps}, **options)


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 16])
def test_a_fixed_horizon_plans_every_so_many_steps_and_executes_the_plan_as_it_is(steps):
    vla = DriftingVLA(drift=0.01)
    policy = horizon(vla, steps)
    actions = play(policy, vla, 48)
    every = min(steps, PLAN)
    assert vla.asked == list(range(0, 48, every))
    expected = [plan(t - t % every, 0.01)[t % every] for t in range(48)]
    np.testing.assert_array_equal(actions, expected)
    assert [s.plan_age for s in policy.steps] == [t % every or None for t in range(48)]
    stats = policy.stats()
    assert (stats["kept"], stats["generated"], stats["vla_calls"]) == (48 - len(vla.asked), 0, len(vla.asked))


def test_the_whole_plan_kept_is_what_the_vla_alone_does():
    vla = DriftingVLA(drift=0.01)
    alone = play(spvla.accelerate(vla, generator="none"), vla, 60)
    asked = list(vla.asked)
    np.testing.assert_array_equal(play(horizon(vla, PLAN), vla, 60), alone)
    assert vla.asked == asked


def test_the_run_limit_is_one_of_steps_without_a_look():
    vla = DriftingVLA()
    play(horizon(vla, PLAN, max_generated_run=3), vla, 20)
    assert vla.asked == [0, 4, 8, 12, 16]


def test_pace_plans_again_where_the_plan_is_slow_or_the_gripper_turns():
    vla = DriftingVLA()
    play(spvla.accelerate(vla, generator="plan", gate="pace", rule={"speed": 0.3}), vla, 60)
    slow = {t for t in range(60) if abs(fresh(t)[0]) < 0.3 or fresh(t)[6] != fresh(t - 1)[6]}
    assert slow <= set(vla.asked)
    assert all(t in slow or t - max(a for a in vla.asked if a < t) == PLAN for t in vla.asked if t)


def test_reuse_repeats_similar_actions_at_most_three_times_in_a_row():
    vla = DriftingVLA()
    actions = play(spvla.accelerate(vla, generator="last", gate="reuse", rule={"similar": 0.2}), vla, 30)
    reused = np.array([t not in vla.asked for t in range(30)])
    assert reused.sum() > 0 and not any(reused[t : t + 4].all() for t in range(27))
    for t in np.flatnonzero(reused):
        np.testing.assert_array_equal(actions[t], actions[t - 1])


class Scores:
    """A classifier in all but its weights: given probabilities of the two arms, by the age of the plan."""

    arms = True
    features = SimpleNamespace(familiar_now=lambda window: np.ones(len(window.states), bool))

    def __init__(self, generated, planned):
        self.generated, self.planned = generated, planned

    def estimate(self, window, proposals, without_torch=True):
        age = window.vla_age.astype(int)
        return np.stack([np.take(self.generated, age), np.take(self.planned, age)])


class ArmsGate:
    """The learned gate's decision with such scores."""

    history_length, reads_plan = 1, True

    def __init__(self, generated, planned, threshold):
        self.classifier, self.threshold = Scores(generated, planned), threshold

    def decide(self, window, proposals):
        v = judge(self.classifier, LIBERO, window, proposals)
        reason = np.repeat("classifier", len(proposals))
        opens, refused = v.intuitive(self.threshold), v.refused(self.threshold)
        return Decisions(opens, reason, v.probability, refused, kept=v.kept, threshold=self.threshold)


class Still:
    """A generator that proposes to stand, gripper open; or what is not admissible."""

    space, history_length = LIBERO, 1

    def __init__(self, value=0.0):
        self.value = value

    def propose(self, window):
        out = np.zeros((len(window.actions), 1, LIBERO.dim), np.float32)
        out[..., 0], out[..., 6] = self.value, -1
        return out


def test_the_arm_that_is_less_likely_to_deviate_acts_if_that_is_below_the_threshold():
    generated = [1, 0.5, 0.1, 0.4, 0.5, 0.9, 0.9, 0.9, 0.2, 0.9, 0.9]
    planned = [1, 0.1, 0.2, 0.3, 0.6, 0.9, 0.9, 0.9, 0.0, 0.0, 0.0]
    vla = DriftingVLA()
    policy = SPVLAPolicy(vla, Still(), ArmsGate(generated, planned, 0.4))
    actions = play(policy, vla, 5)
    sources = [Source.VLA, Source.PLAN, Source.GENERATOR, Source.PLAN, Source.VLA]
    assert [s.source for s in policy.steps] == sources and vla.asked == [0, 4]
    assert [s.plan_age for s in policy.steps] == [None, 1, None, 3, None]
    assert [s.probability for s in policy.steps] == [None, 0.1, 0.1, 0.3, 0.5]
    np.testing.assert_array_equal(actions[3], fresh(3))
    np.testing.assert_array_equal(actions[2], Still().propose(policy.history.window())[0, 0])


def test_a_plan_that_is_used_up_is_no_candidate_however_well_it_scores():
    vla = DriftingVLA()
    policy = SPVLAPolicy(vla, Still(), ArmsGate([0.9] * 20, [0.0] * 20, 0.5))
    play(policy, vla, 20)
    assert vla.asked == [0, 8, 16]
    policy = SPVLAPolicy(vla, Still(), ArmsGate([0.3] * 20, [0.0] * 20, 0.5), max_generated_run=10)
    play(policy, vla, 20)
    assert vla.asked == [0, 11] and policy.stats()["generated"] == 3 + 1


def test_a_proposal_out_of_bounds_leaves_the_plan():
    vla = DriftingVLA()
    policy = SPVLAPolicy(vla, Still(value=7.0), ArmsGate([0.0] * 20, [0.4] * 20, 0.5))
    play(policy, vla, 9)
    assert vla.asked == [0, 8] and policy.stats()["kept"] == 7 and policy.stats()["fallbacks"] == 1


@pytest.mark.parametrize("drift, deviates", [(0.0, 0), (0.3, 1)])
@pytest.mark.parametrize("executed", [True, False])
def test_audits_judge_what_the_plan_would_have_done(drift, deviates, executed):
    vla = DriftingVLA(drift)
    inner = HorizonGate(LIBERO, PLAN)
    options = LiveOptions(audit=0.5, executed=executed, agreement=False, step=1e-4, pause=0)
    gate = LiveGate(inner, [0.5], 1.0, 0.1, LIBERO, 0.2, options)
    policy = SPVLAPolicy(vla, PlanGenerator(LIBERO), gate)
    play(policy, vla, 200)
    audits = [i for i, s in enumerate(policy.steps) if s.reason == "audit"]
    assert len(audits) == gate.state.audits > 20
    assert gate.state.found == deviates * len(audits), "every action of age 1 or more deviates, or none does"
    assert all(policy.steps[i].source == (Source.VLA if executed else Source.PLAN) for i in audits)


def test_a_live_gate_stops_keeping_plans_that_deviate():
    vla = DriftingVLA(0.3)
    gate = LiveGate(HorizonGate(LIBERO, PLAN), [0.5], 1.0, 0.05, LIBERO, 0.2, LiveOptions(step=0.05))
    policy = SPVLAPolicy(vla, PlanGenerator(LIBERO), gate)
    play(policy, vla, 600)
    kept = np.array([s.source == Source.PLAN for s in policy.steps])
    assert kept[:100].any() and kept[300:].mean() < 0.06


def test_while_the_vla_is_away_a_kept_plan_is_the_safe_action_of_the_generator_mode():
    class Away(DriftingVLA):
        def predict(self, observation, keep_mass=1.0):
            if self.now == 3:
                raise VLAUnavailable("gone")
            return super().predict(observation)

    vla = Away()
    gate = ArmsGate([0.9] * 20, [1, 0.1, 0.1, 0.7, 0.1], 0.5)
    policy = SPVLAPolicy(vla, Still(), gate, when_unavailable="generator")
    actions = play(policy, vla, 4)
    assert policy.steps[3].unavailable and policy.steps[3].source == Source.PLAN
    np.testing.assert_array_equal(actions[3], fresh(3))


def test_recording_keeps_whole_plans_where_the_vla_was_asked(tmp_path):
    vla = DriftingVLA(0.01)
    with Recorder(horizon(vla, 4), tmp_path / "store") as policy:
        play(policy, vla, 12)
    (episode,) = read_episodes(tmp_path / "store")
    assert episode.sources.tolist() == [0, 3, 3, 3] * 3
    asked = ~np.isnan(episode.vla_plans).any(1)
    assert np.flatnonzero(asked).tolist() == [0, 4, 8] == np.flatnonzero(~np.isnan(episode.vla_actions).any(1)).tolist()
    np.testing.assert_array_equal(episode.vla_plans[4].reshape(PLAN, -1), plan(4, 0.01))


def test_a_window_has_the_rest_of_the_plan():
    history = ActionHistory(LIBERO, 3, plans=True)
    vla = DriftingVLA(0.01)
    for t in range(10):
        history.observe(np.zeros(2, np.float32))
        window = history.window()
        assert window.plan_left[0] == (0 if t == 0 else max(0, PLAN - t))
        if 0 < t < PLAN:
            np.testing.assert_allclose(window.plan[0], plan(0, 0.01)[t:], atol=1e-6)
            np.testing.assert_array_equal(history.planned, plan(0, 0.01)[t])
        else:
            assert not window.plan.any() and history.planned is None
        history.act(fresh(t), Source.PLAN if t else Source.VLA, vla.predict(None) if t == 0 else None)
    assert ActionHistory(LIBERO, 3).plans is False


def never_waiting(gate, latency, drift=0.0, steps=40):
    """A policy that never waits, its VLA, and its actions."""
    vla = DriftingVLA(drift)
    policy = BridgePolicy(vla, Still(), gate, calls=SimulatedCalls(vla, latency), space=LIBERO)
    policy.reset("go")
    actions = []
    for vla.now in range(steps):
        seen = np.full(3, vla.now, np.float32)
        actions.append(policy.tick(lambda seen=seen: Observation(None, seen), seen))
    return policy, vla, actions


def test_a_plan_that_comes_while_the_robot_stands_begins_at_its_start():
    policy, vla, actions = never_waiting(HorizonGate(LIBERO, PLAN - 2), 3)
    kept = [t for t, s in enumerate(policy.steps) if s.source == Source.PLAN]
    assert len(kept) > 10 and vla.asked[:3] == [0, 9, 18]
    for t in kept:
        begun = t - policy.steps[t].plan_age
        assert policy.steps[begun].source == Source.VLA and policy.steps[begun - 1].source == Source.HELD
        np.testing.assert_allclose(actions[t], plan(begun - 3, 0.0)[t - begun], atol=1e-6)


def test_a_plan_that_comes_while_an_older_one_is_kept_goes_on_where_it_is_due():
    gate = ArmsGate([1.0] * 30, [0.0, 0.0, 0.06, 0.06, 0.06, 0.06, 0.06, 0.06, *[1.0] * 22], 0.1)
    policy, vla, actions = never_waiting(gate, 2, drift=0.01)
    steps = policy.steps
    ages = [s.plan_age for s in steps if s.called_vla and s.source == Source.PLAN]
    assert ages and min(ages) >= 2  # the next is asked for where half of the threshold is reached, not before
    assert all(s.source == Source.PLAN for s in steps[3:])
    for t in range(12, 40):
        age = steps[t].plan_age
        assert 2 <= age < PLAN and t - age in vla.asked
        np.testing.assert_allclose(actions[t], plan(t - age, 0.01)[age], atol=1e-6)


def test_what_training_reads_of_late_plans_is_what_the_policy_saw(tmp_path):
    seen = []

    class Noted(ArmsGate):
        def decide(self, window, proposals):
            seen.append((window.plan[0].copy(), int(window.plan_left[0]), window.vla_age[0]))
            return super().decide(window, proposals)

    vla = DriftingVLA(0.01)
    gate = Noted([1.0] * 30, [0.0, 0.0, 0.06, 0.06, 0.06, 0.06, 0.06, 0.06, *[1.0] * 22], 0.1)
    policy = Recorder(BridgePolicy(vla, Still(), gate, calls=SimulatedCalls(vla, 2), space=LIBERO), tmp_path / "store")
    policy.reset("go")
    for vla.now in range(40):
        state = np.full(3, vla.now, np.float32)
        policy.tick(lambda state=state: Observation(None, state), state)
    policy.finish(success=True)
    policy.close()
    windows = Windows([RolloutStore(tmp_path / "store")], history=1, plans=True)
    decided = [i for i, s in enumerate(policy.steps) if s.reason == "classifier"]
    assert len(decided) == len(seen) > 25
    read = windows.batch(np.array(decided)).window
    for i, (rest, left, age) in enumerate(seen):
        assert (read.plan_left[i], read.vla_age[i]) == (left, age)
        np.testing.assert_allclose(read.plan[i, :left], rest[:left], atol=1e-6)


def test_a_generator_that_reads_plans_needs_a_gate_that_does():
    with pytest.raises(InputError) as caught:
        spvla.accelerate(DriftingVLA(), generator="plan", gate="release")
    assert caught.value.code == "no-plan"


@pytest.mark.parametrize("arms, least", [(True, 0.06), (False, 0.15 + 1e-9)])
def test_a_risk_below_the_floor_is_refused(arms, least):
    floor = NoiseFloor(stale=(0.0, 0.1, 0.2, 0.3), fresh=0.06)
    floor.require(least, arms)
    with pytest.raises(InputError) as caught:
        floor.require(least - 1e-6, arms)
    assert (caught.value.code, caught.value.field) == ("below-floor", "risk")
    replace(floor, fresh=None).require(1e-6, arms=True)
    assert floor.horizon(2) == pytest.approx(0.05) and NoiseFloor.of({"noise_floor": floor.to_dict()}) == floor


def test_cells_of_the_baselines():
    cells = parse_cells(["plan@4", "pace", "reuse", "plan+half@2", "mlp+learned@0.1"], [None])
    names = ["vla", "plan@4", "pace", "reuse", "plan+half@2", "mlp+learned@0.1"]
    assert [c.name for c in cells] == names
    assert cells[1] == Cell("plan", "horizon", horizon=4) and cells[3] == Cell("last", "reuse")
    assert parse_cells(names, [None]) == cells
    for wrong in ("plan", "plan@0", "plan@0.5", "pace@2"):
        with pytest.raises(InputError):
            parse_cells([wrong], [None])


def test_a_summary_counts_both_arms():
    row = {
        "cell": "a",
        "suite": "s",
        "task": 0,
        "init_state": 1,
        "seed": 2,
        "generator": "mlp",
        "gate": "learned",
        "pruning": "none",
    }
    row |= {"success": True, "steps": 20, "held": 0, "vla_calls": 5, "generated": 5, "kept": 10, "deviating": 3, "fallbacks": 0}
    row |= {"switches": 4, "generated_run_lengths": [7, 8], "nudged": None, "visual_tokens_mean": None, "live_steps": None}
    (found,) = summarise([row], {})
    assert (found["kept"], found["generated"], found["skipped"]) == (0.5, 0.25, 0.75)
    assert found["deviation_rate"] == pytest.approx(0.15) and found["deviating_among_generated"] == pytest.approx(0.2)
    (before,) = summarise([row | {"kept": [3, 1]}], {})
    assert "kept" not in before and before["skipped"] == 0.25
