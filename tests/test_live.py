"""The live gate against adversaries: its bound holds in any world, its meter covers at all times, its state survives."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.envs.base import Task
from eval.cells import parse_cells
from eval.run import groups_of
from spvla import InputError, Observation, SPVLAPolicy, accelerate, load_export
from spvla.actions import LIBERO
from spvla.gates.base import Decisions
from spvla.gates.live import LiveGate, LiveOptions, advance
from spvla.gates.meter import ENOUGH, RUN_LENGTH, DriftAlarm, losses_bound, mostly_wrong
from spvla.gates.rules import ReleaseRule
from spvla.history import Source
from tests.conftest import ScriptedVLA
from tests.test_policy import Fixed, run

A, B = np.zeros(7, np.float32), np.full(7, 0.9, np.float32)
STEPS, SEEDS = 3000, 200


def deploy(world, allowed=0.05, step=0.01, audit=0.1, start=0.8, steps=STEPS, seeds=SEEDS, seed=0):
    """Many deployments side by side: losses and coins, (steps, seeds). ``world(t, seen, rng)`` gives this step's scores and
    deviations (seeds,); ``seen`` has the thresholds now and the last step's coins, losses and audits."""
    rng, coins = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    seen = SimpleNamespace(threshold=np.full(seeds, start), coin=np.zeros(seeds, bool), loss=np.zeros(seeds, bool))
    losses, thrown = np.zeros((2, steps, seeds), bool)
    for t in range(steps):
        score, deviates = world(t, seen, rng)
        seen.coin = coins.random(seeds) < audit
        seen.loss = (score < seen.threshold) & deviates
        losses[t], thrown[t] = seen.loss, seen.coin
        moved = seen.threshold + step * (allowed - (seen.coin & seen.loss) / audit)  # as advance() does, for all at once
        seen.threshold = np.minimum(1.0, np.maximum(-step / audit, moved))
        assert (seen.threshold >= -step / audit - 1e-12).all() and (seen.threshold <= 1).all()
    return losses, thrown


def calibrated(t, seen, rng):
    score = rng.random(SEEDS)
    return score, rng.random(SEEDS) < 0.5 * score**4


def bad_at_half_time(t, seen, rng):
    score, deviates = calibrated(t, seen, rng)
    return score, deviates | (t >= STEPS // 2) & (rng.random(SEEDS) < 0.6)


def bad_unless_just_audited(t, seen, rng):
    return np.zeros(SEEDS), ~seen.coin


def never(t, seen, rng):
    return rng.random(SEEDS), np.zeros(SEEDS, bool)


def bad_when_open(t, seen, rng):
    return np.zeros(SEEDS), seen.threshold > 0.3


def always(t, seen, rng):
    return np.zeros(SEEDS), np.ones(SEEDS, bool)


def require_bound(losses, allowed=0.05, step=0.01, audit=0.1, start=0.8):
    mean = losses.mean(0)
    slack = (start + step / audit) / (step * len(losses))
    assert mean.mean() <= allowed + slack + 3 * mean.std() / np.sqrt(mean.size)


@pytest.mark.parametrize("world", [calibrated, bad_at_half_time, bad_unless_just_audited, never, bad_when_open, always])
def test_the_bound_holds_on_average_in_any_world(world):
    losses, _ = deploy(world)
    require_bound(losses)
    if world is never:
        assert not losses.any()
    elif world is calibrated:
        assert losses[STEPS // 2 :].mean() > 0.03  # and what is allowed is used


@settings(max_examples=25)
@given(
    rates=st.lists(st.floats(0, 1), min_size=2, max_size=5),
    sharpness=st.floats(0, 6),
    memory=st.sampled_from(["none", "coin", "loss", "threshold"]),
    allowed=st.floats(0.01, 0.2),
    step=st.floats(0.002, 0.1),
    audit=st.floats(0.05, 0.5),
    start=st.floats(0, 1),
    seed=st.integers(0, 2**16),
)
def test_the_bound_holds_for_worlds_made_up(rates, sharpness, memory, allowed, step, audit, start, seed):
    def world(t, seen, rng):
        score = rng.random(SEEDS)
        rate = rates[t * len(rates) // 800] * score**sharpness
        known = {"none": 0.5, "coin": ~seen.coin, "loss": seen.loss, "threshold": seen.threshold}[memory]
        return score, rng.random(SEEDS) < 2 * rate * known

    numbers = {"allowed": allowed, "step": step, "audit": audit, "start": start}
    losses, _ = deploy(world, steps=800, seed=seed, **numbers)
    require_bound(losses, **numbers)


@pytest.mark.parametrize("world", [calibrated, bad_at_half_time, bad_unless_just_audited, bad_when_open, always])
@pytest.mark.parametrize("audit", [0.05, 0.3])
def test_the_meter_covers_at_all_times(world, audit):
    covered, runs = 0, 0
    for seed in range(3):
        losses, coins = deploy(world, audit=audit, seed=10 * seed, steps=1500)
        total, found = losses.cumsum(0), (losses & coins).cumsum(0)
        bound = np.array([losses_bound(k, audit) for k in range(found.max() + 1)])
        covered += (total <= bound[found]).all(0).sum()
        runs += SEEDS
    assert covered >= 0.95 * runs - 3 * np.sqrt(0.05 * 0.95 * runs)
    assert bound[found[-1]].mean() <= 2 * total[-1].mean() + 8 / audit  # and it is not an empty one


@pytest.mark.slow
@pytest.mark.parametrize("audit", [0.02, 0.1, 0.5])
def test_the_meter_covers_in_the_long_run(audit):
    found = (np.random.default_rng(0).random((5000, 4000)) < audit).cumsum(1)
    bound = np.array([losses_bound(k, audit) for k in range(found.max() + 1)])
    ever = (np.arange(1, 4001) > bound[found]).any(1).mean()
    assert ever <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 5000)


def test_bounds_by_hand():
    assert losses_bound(3, 1.0) == 3
    # Nothing found: (1 - p)^-N, of which the coarsest alternative has half of the weight, stays below 20.
    assert losses_bound(0, 0.1) <= int(np.log(40) / -np.log(0.9))
    bounds = [losses_bound(k, 0.1) for k in range(50)]
    assert (np.diff(bounds) > 0).all()


def alarms(rate, steps=4000, allowed=0.05, audit=0.1, seed=0):
    rng, alarm, evidence, count = np.random.default_rng(seed), DriftAlarm(allowed, audit), 1.0, 0
    for _ in range(steps):
        evidence, raised = alarm.advance(evidence, (rng.random() < rate * audit) / audit)
        count += raised
    return count


def test_the_alarm_comes_where_the_risk_is_broken_and_only_there():
    assert all(alarms(0.2, seed=s) >= 1 for s in range(10))
    assert sum(alarms(0.05, seed=s) for s in range(25)) <= 2 * 25 * 4000 / RUN_LENGTH


@pytest.mark.parametrize(("rate", "least", "most"), [(0.95, 5, 20), (0.7, 8, 200), (0.5, ENOUGH, 1e9), (0.3, 2000, 1e9)])
def test_it_takes_audits_that_are_mostly_wrong_to_know_it(rate, least, most):
    rng, lengths = np.random.default_rng(0), []
    for _ in range(50):
        evidence, enough, count = 1.0, False, 0
        while not enough and count < 10_000:
            evidence, enough = mostly_wrong(evidence, rng.random() < rate)
            count += 1
        lengths.append(count)
    assert least <= np.mean(lengths) <= most


class Scored:
    """A gate that allows all, at scores in turn."""

    history_length = 1

    def __init__(self, scores):
        self.scores, self.count = scores, 0

    def decide(self, window, proposals):
        self.count += 1
        score = self.scores[(self.count - 1) % len(self.scores)]
        return Decisions(np.array([True]), np.array(["scored"]), np.array([score]))


def live(start=1.0, scores=(0.5,), risk=0.05, **options):
    grid = tuple(np.linspace(0, 1, 101))
    return LiveGate(Scored(scores), grid, start, risk, LIBERO, 0.2, LiveOptions(**options), {"export": "e"})


def play(gate, answers):
    """Reasons of the steps of one episode in which the generator always proposes A and the VLA would answer ``answers``."""
    gate.begin("do it")
    gate.observe(A, answers[0])  # the first step is the VLA's
    out = []
    for answer in answers[1:]:
        decision = gate.decide(None, A[None])[0]
        out.append("G" if decision.intuitive and not decision.audit else decision.reason[0])
        gate.observe(A, None if out[-1] == "G" else answer)
    return "".join(out)


def test_the_coin_depends_on_the_seed_alone():
    slow = {"step": 1e-6, "pause": 0, "agreement": False}

    def alone(answers):
        return play(live(**slow), answers)

    agree, deny = alone([A] * 300), alone([B] * 300)
    assert agree == deny == alone([A] * 300)
    assert 15 <= agree.count("a") <= 50 and set(agree) == {"a", "G"}
    assert agree != play(live(**slow, seed=1), [A] * 300)
    # Nor on what the gate does: where half of the steps are called, the coins of the others are the same.
    half = play(live(0.7, step=1e-6, pause=0, scores=(0.2, 0.9), agreement=False), [A] * 300)
    assert half[::2] == agree[::2] and set(half[1::2]) == {"s"}


def test_after_a_disagreement_the_vla_acts_until_they_agree():
    answers = [A, *[B] * 100, *[A] * 100]
    steps = play(live(step=1e-6, audit=0.2), answers)
    first = steps.index("a")
    assert set(steps[first + 1 : 101]) == {"d"} and "d" not in steps[101:] and "G" in steps[101:]


def test_the_gate_moves_as_the_formula_says():
    gate = live(0.8, audit=0.25, agreement=False, pause=0)
    threshold = 0.8
    gate.begin("do it")
    for _ in range(200):
        decision = gate.decide(None, A[None])[0]
        gate.observe(A, B if decision.audit else None)
        threshold = advance(threshold, 0.05 / 0.75 - (4.0 if decision.audit else 0.0), 0.01, -0.04)
        assert gate.state.threshold == pytest.approx(threshold)
    stats = gate.stats()
    found = gate.state.found
    assert stats["live_risk"] == pytest.approx(3 * found / 200)
    assert stats["live_risk_bound95"] == pytest.approx((losses_bound(found, 0.25) - found) / 200)
    assert len(gate.state.path) > 5 and gate.state.path[0][0] == 0


def test_a_path_stays_short():
    gate = live()
    for _ in range(20_000):
        gate.observe(None, None)
    assert len(gate.state.path) <= 512 and gate.state.path[-1][0] > 19_000


def test_a_deployment_goes_on_where_it_was(tmp_path):
    answers = [A if i % 3 else B for i in range(200)]
    whole = live(0.8, audit=0.3)
    expected = play(whole, answers) + play(whole, answers)
    first, second = live(0.8, audit=0.3), live(0.1, audit=0.3, seed=5)
    begun = play(first, answers)
    first.save(tmp_path / "live.json")
    second.load(tmp_path / "live.json")
    second.gate.count = first.gate.count
    assert begun + play(second, answers) == expected
    assert second.stats() == whole.stats()
    with pytest.raises(InputError, match=r"live.json: audit is 0.3, this policy's is 0.1"):
        live().load(tmp_path / "live.json")
    other = live(audit=0.3)
    other.identity = {"export": "another"}
    with pytest.raises(InputError, match="identity"):
        other.load(tmp_path / "live.json")
    (tmp_path / "live.json").write_text("{")
    with pytest.raises(InputError, match=r"live\.json: not valid JSON"):
        first.load(tmp_path / "live.json")


def test_tasks_apart_on_request(tmp_path):
    gate = live(audit=0.3, per_task=True, agreement=False, pause=0)
    gate.begin("one")
    for _ in range(150):
        gate.decide(None, A[None])[0]
        gate.observe(A, B)
    sunk = gate.state.threshold
    gate.begin("two")
    assert gate.state.threshold == 1.0 > sunk
    gate.save(tmp_path / "live.json")
    back = live(audit=0.3, per_task=True, agreement=False)
    back.load(tmp_path / "live.json")
    back.begin("one")
    assert back.state.threshold == sunk


def test_where_most_is_wrong_the_gate_says_so_and_pauses_longer_each_time(tmp_path):
    gate = live(start=0.9, pause=500)
    with pytest.warns(UserWarning, match="most of what the generator does here is wrong") as told:
        reasons = "".join(play(gate, [A] + 99 * [B]) for _ in range(250))
    assert len(told) == gate.stats()["live_pauses"] >= 3
    lengths = [len(m[0]) for m in re.finditer("p+", reasons)]
    for k, length in enumerate(lengths[:2]):  # the first step of an episode is none of these
        assert 0.98 * 500 * 2**k <= length <= 500 * 2**k
    tireless = live(start=0.9, pause=0)
    always = "".join(play(tireless, [A] + 99 * [B]) for _ in range(250))
    assert 0 < sum(map(reasons.count, "Ga")) < 0.5 * sum(map(always.count, "Ga"))

    gate.save(tmp_path / "live.json")
    other = live(start=0.9, pause=500)
    other.load(tmp_path / "live.json")
    assert (other.state.until, other.state.pauses, other.state.wrong) == (gate.state.until, gate.state.pauses, gate.state.wrong)


@pytest.mark.parametrize("options", [{"audit": 0.0}, {"audit": 1.0}, {"step": 0.0}, {"start": -0.1}, {"seed": -1}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        LiveOptions(**options)


@pytest.mark.parametrize("executed", [True, False])
def test_audits_in_the_control_loop(executed):
    gate = live(audit=0.3, executed=executed, agreement=False)
    vla = ScriptedVLA(np.tile(A, (60, 1)) + 0.1)
    policy = SPVLAPolicy(vla, Fixed(A), gate)
    out = run(policy, 60)
    audited = np.array([s.reason == "audit" for s in policy.steps])
    stats = policy.stats()
    assert stats["audits"] == audited.sum() == gate.state.audits > 5
    assert gate.state.steps == 60 and gate.state.found == 0
    asked = np.array(["vla" in s.milliseconds for s in policy.steps])
    assert asked[audited].all() and stats["vla_calls"] == asked.sum()
    np.testing.assert_allclose(out[audited], 0.1 if executed else 0.0)
    assert {s.source for s in np.array(policy.steps)[audited]} == {Source.VLA if executed else Source.GENERATOR}
    assert policy.live is gate


def test_accelerate_makes_live_gates(tmp_path):
    export = load_export("generator_libero_expert")
    vla = ScriptedVLA(np.zeros((30, 7), np.float32))
    policy = accelerate(vla, export, risk=0.05, gate="live")
    fixed = accelerate(vla, export, risk=0.05, gate="learned")
    grid = export.calibration["mlp"].thresholds
    start = policy.live.state.threshold
    assert all((policy.live.score(p) < start) == (p <= fixed.gate.threshold) for p in grid)  # it starts where the other stays
    policy.live.save(tmp_path / "live.json")
    accelerate(vla, export, risk=0.1, gate="live").live.load(tmp_path / "live.json")
    with pytest.raises(InputError, match="identity"):
        accelerate(vla, export, gate="live", generator="ridge").live.load(tmp_path / "live.json")
    assert accelerate(vla, export, risk=1e-4, gate="live").live.state.threshold == 0  # more than calibration can vouch for
    assert accelerate(vla, export, gate="live", rule={"start": 0.0}).live.state.threshold == 0
    rule = LiveGate(ReleaseRule(LIBERO), (), 1.0, 0.05, LIBERO, 0.2)
    assert rule.score(None) < rule.state.threshold
    with pytest.raises(InputError, match="needs an export"):
        accelerate(vla, None, risk=0.05, gate="live")
    with pytest.raises(InputError, match="live"):
        accelerate(vla, export, gate="live", rule={"audit": 2})
    with pytest.raises(InputError, match="no live gate"):
        _ = fixed.live


def test_a_step_that_failed_keeps_its_coin():
    gate = live(audit=0.5)
    gate.begin("do it")
    gate.observe(A, A)
    for _ in range(50):
        once = gate.decide(None, A[None])[0]
        assert gate.decide(None, A[None])[0] == once  # the VLA did not answer: the same step again
        gate.observe(A, A if once.audit else None)


def test_observations_need_no_state():
    policy = SPVLAPolicy(ScriptedVLA(np.zeros((9, 7), np.float32)), Fixed(A), live())
    policy.reset("do it")
    policy.select_action(Observation(state=None))
    assert policy.live.state.steps == 1


@pytest.mark.parametrize("workers", [1, 4])
def test_all_episodes_of_a_live_cell_are_one_deployment(workers):
    tasks = [Task("libero_object", i, f"task {i}", "do it", 100) for i in range(3)]
    starts = {task: [(state, 7) for state in range(20)] for task in tasks}
    cells = parse_cells(["mlp+learned@0.1", "mlp+live@0.1", "mlp+live@0.2"], [None])
    parts = groups_of(starts, cells, [], workers, None)
    live = [part for part in parts if part[0].jobs[0].cell.live]
    assert [[job.init_state for group in part for job in group.jobs] for part in live] == 2 * [3 * [*range(20)]]
    assert all(len({job.cell for group in part for job in group.jobs}) == 1 for part in live)
    done = [
        {"cell": "mlp+live@0.1", "task": 0, "init_state": i, "seed": 7, "live_steps": 90 * (i + 1), "live": {"coin": i}}
        for i in range(4)
    ]
    (rest, _) = [part for part in groups_of(starts, cells, done, workers, None) if part[0].jobs[0].cell.live]
    assert rest[0].jobs[0].init_state == 4 and rest[0].jobs[0].learned == {"coin": 3}
