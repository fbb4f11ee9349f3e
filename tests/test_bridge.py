"""A policy that never waits: who acts while the VLA thinks, what becomes of its answers, and what a recording says of it."""

import threading
from dataclasses import replace

import numpy as np
import pytest

from data.store import RolloutStore
from data.windows import Windows
from eval.cells import parse_cells
from spvla import InputError, Observation, VLAUnavailable, accelerate
from spvla.actions import LIBERO
from spvla.gates.base import Decisions
from spvla.gates.live import LiveGate, LiveOptions
from spvla.generators.ridge import LastActionGenerator
from spvla.history import ActionHistory, Source
from spvla.realtime import MOST_AUDITS, BridgePolicy, SimulatedCalls
from spvla.recording import Recorder
from spvla.store import read_episodes
from spvla.vlas.base import VLAOutput
from tests.test_policy import Always, Fixed, sources

SPACE = replace(LIBERO, max_jump=None)


class Clock:
    """A VLA whose plan says at which step each of its actions is due: in hundredths, for a state that tells the step."""

    action_space = SPACE

    def __init__(self, chunk=1):
        self.chunk, self.seen = chunk, []

    def reset(self, instruction):
        pass

    def predict(self, observation, keep_mass=1.0):
        now = int(observation.state[0])
        self.seen.append(now)
        out = np.zeros((self.chunk, 7), np.float32)
        out[:, 0], out[:, 6] = (now + np.arange(self.chunk)) / 100, -1
        return VLAOutput(out)


class When:
    """A gate with one threshold and a probability for each decision in turn."""

    history_length = 4

    def __init__(self, probabilities, threshold=0.2):
        self.probabilities, self.threshold, self.windows = list(probabilities), threshold, []

    def decide(self, window, proposals):
        self.windows.append({name: None if v is None else v.copy() for name, v in vars(window).items()})
        p = np.array([self.probabilities.pop(0) if self.probabilities else 0.0])
        return Decisions(p <= self.threshold, np.array(["when"]), p, threshold=self.threshold)


def bridge(gate, chunk=1, latency=5, generator=True, **options):
    vla = Clock(chunk)
    parts = (LastActionGenerator(SPACE), gate) if generator else ()
    return BridgePolicy(vla, *parts, calls=SimulatedCalls(vla, latency), space=SPACE, **options)


def drive(policy, steps):
    """The actions of so many control steps; the state tells the step."""
    policy.reset("go")
    return [policy.tick(lambda s=step: Observation(state=state(s)), state(step)) for step in range(steps)]


def state(step):
    return np.array([step, 0.5 * step], np.float32)


def asked(policy):
    return [i for i, s in enumerate(policy.steps) if s.called_vla]


def test_the_generator_bridges_every_call_and_the_next_one_goes_out_before_the_run_limit():
    policy = bridge(Always())
    actions = drive(policy, 60)
    assert actions[:5] == [None] * 5 and all(a is not None for a in actions[5:])
    assert sources(policy) == "HHHHHV" + 54 * "G"
    # The answer to step 0 is executed at step 5: age 1 at step 6. A call takes 5 steps and 20 may go by without the VLA.
    assert asked(policy) == [0, 21, 37, 53]
    assert max(s.vla_age for s in policy.steps) == 20 and policy.stats()["held"] == 5


def test_what_the_gate_foresees_is_asked_ahead():
    policy = bridge(When([0.0, 0.0, 0.0, 0.11, 0.12, 0.13, 0.14]), ahead=0.5)
    drive(policy, 20)
    assert asked(policy)[:2] == [0, 9]  # the decision of step 9 is the fourth, the first above half of the threshold
    drive(lazy := bridge(When([0.0, 0.0, 0.0, 0.11, 0.12, 0.13, 0.14]), ahead=0.9), 20)
    assert asked(lazy) == [0]
    drive(eager := bridge(Always(), ahead=0.0), 12)
    assert asked(eager) == [0], "a gate without a probability foresees nothing"


def test_where_nobody_may_act_the_robot_stands_until_an_answer_about_where_it_stands():
    policy = bridge(When(20 * [0.9]))
    actions = drive(policy, 18)
    assert sources(policy) == "HHHHHV" + "HHHHHV" + "HHHHHV"
    assert asked(policy) == [0, 6, 12]
    np.testing.assert_allclose([actions[i][0] for i in (5, 11, 17)], [0.0, 0.06, 0.12], atol=1e-6)
    np.testing.assert_array_equal(actions[8], LIBERO.stop(actions[5]))


def test_an_answer_about_a_state_that_the_robot_has_left_is_context_alone():
    moving = [0.0, 0.0, 0.15] + 6 * [0.0]
    policy = bridge(When(moving))
    drive(policy, 16)
    assert asked(policy)[:2] == [0, 8] and sources(policy)[5:16] == "V" + 10 * "G"
    ages = [s.vla_age for s in policy.steps]
    assert ages[6:16] == [1, 2, 3, 4, 5, 6, 7, 5, 6, 7], "from step 13 on it is the answer to step 8"
    np.testing.assert_allclose(policy.gate.windows[-1]["vla_action"][0, 0], 0.08, atol=1e-6)
    np.testing.assert_array_equal(policy.gate.windows[-1]["vla_state"][0], state(8))


def test_a_plan_goes_on_while_the_next_one_is_made_and_is_spliced_where_it_is_due():
    policy = bridge(None, chunk=12, latency=4, generator=False)
    actions = drive(policy, 60)
    values = [100 * a[0] for a in actions[4:]]
    np.testing.assert_allclose(values[:12], np.arange(12), atol=1e-4)  # the robot stood: the first plan begins at its start
    np.testing.assert_allclose(values[12:], np.arange(16, 60), atol=1e-4)
    assert "H" not in sources(policy)[4:]


def test_an_answer_that_goes_beyond_the_training_data_is_approached_in_jumps_that_do_not():
    jumps = replace(SPACE, max_jump=(0.25, *6 * (0.25,)))
    vla = Clock()
    vla.predict = lambda observation, keep_mass=1.0: VLAOutput(np.array([[1.0, 0, 0, 0, 0, 0, -1]], np.float32))
    policy = BridgePolicy(vla, LastActionGenerator(jumps), When(50 * [0.9]), calls=SimulatedCalls(vla, 1), space=jumps)
    moved = [a[0] for a in drive(policy, 8) if a is not None]
    assert max(np.abs(np.diff([0.0, *moved]))) <= 0.2502


def test_an_outage_is_bridged_and_then_waited_out():
    policy = bridge(Always(), max_generated_run=6, latency=1)
    alive = policy.vla.predict

    def dead(observation, keep_mass=1.0):
        raise VLAUnavailable("nobody there")

    policy.reset("go")
    for step in range(30):
        policy.vla.predict = dead if 3 <= step < 20 else alive
        policy.tick(lambda s=step: Observation(state=state(s)), state(step))
    made = sources(policy)
    assert made[:2] == "HV" and made[2:8] == "GGGGGG" and set(made[9:20]) == {"H"} and "V" in made[20:23]
    told = [s.unavailable for s in policy.steps]
    assert told[10] == "nobody there" and told[25] is None and policy.stats()["unavailable"] > 5


def test_a_vla_that_is_slower_than_the_generator_may_go_on_is_told_once():
    policy = bridge(Always(), max_generated_run=4, latency=8)
    with pytest.warns(UserWarning, match="8 control steps") as told:
        drive(policy, 80)
    assert len(told) == 1


def test_what_training_reads_from_a_recording_is_what_the_policy_saw(tmp_path):
    gate = When(np.random.default_rng(3).uniform(0, 0.3, 200))
    policy = Recorder(bridge(gate, latency=4, max_generated_run=9), tmp_path / "store")
    drive(policy, 80)
    policy.finish(success=True)
    policy.close()
    (episode,) = read_episodes(tmp_path / "store")
    ages = np.array([s.vla_age for s in policy.steps])
    np.testing.assert_array_equal(episode.vla_ages, ages)
    answered = np.flatnonzero(np.isfinite(episode.vla_actions[:, 0]))
    calls = [i for i in asked(policy) if i + 4 < 80]
    assert set(calls) <= set(answered.tolist())
    np.testing.assert_allclose(100 * episode.vla_actions[calls, 0], calls, atol=1e-4)
    windows = Windows([RolloutStore(tmp_path / "store")], history=4)
    decided = np.array([i for i, s in enumerate(policy.steps) if s.reason == "when"])
    read, seen = windows.batch(decided).window, gate.windows
    assert len(decided) == len(seen) > 40
    for name in ("actions", "sources", "mask", "states", "vla_action", "vla_state", "vla_age"):
        together = np.concatenate([w[name] for w in seen])
        np.testing.assert_allclose(getattr(read, name), together, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("age", [-1, 3])
def test_an_age_that_cannot_be_is_refused(tmp_path, age):
    policy = Recorder(bridge(Always(), latency=1), tmp_path)
    drive(policy, 3)
    policy._record.ages[2] = age
    with pytest.raises(InputError) as caught:
        policy.finish()
    assert (caught.value.code, caught.value.field) == ("damaged", "vla_age")


# ------------------------------------------------------------------------------------------------------ live audits


def live(start=0.9, **options):
    return LiveGate(Always(), [0.1, 0.2, 0.3], start, 0.05, SPACE, 0.2, LiveOptions(executed=False, agreement=False, **options))


def test_audits_are_silent_and_the_worst_world_is_held_to_the_risk():
    """A VLA that always deviates from what is proposed: of all steps at most the risk, and the slack of the bound, may be the
    generator's."""
    risks, steps, step, p = [], 1500, 0.05, 0.2
    for seed in range(8):
        gate = live(step=step, audit=p, seed=seed)
        vla = Clock()
        vla.predict = lambda observation, keep_mass=1.0: VLAOutput(np.array([[0.9, 0, 0, 0, 0, 0, -1]], np.float32))
        policy = BridgePolicy(vla, Fixed([-0.9, 0, 0, 0, 0, 0, -1]), gate, calls=SimulatedCalls(vla, 3), space=SPACE)
        drive(policy, steps)
        stats = policy.stats()
        risks.append(stats["generated"] / stats["live_steps"])
        assert gate.state.threshold >= -(2 + MOST_AUDITS) * step / p - 1e-9
        assert gate.state.audits >= 1 and gate.state.found == gate.state.audits
        assert policy._audits <= 1 + MOST_AUDITS
    slack = (0.9 + (2 + MOST_AUDITS) * step / p) / (step * steps)
    assert 0 < np.mean(risks) <= 0.05 + slack


def test_audits_that_are_never_answered_do_not_count():
    gate = live(audit=0.5, seed=1)
    policy = bridge(gate, latency=6)
    drive(policy, 30)
    under_way, before, counted = policy._audits, gate.state.threshold, gate.state.steps
    assert under_way > 0
    policy.reset("again")
    assert gate.state.steps == counted - under_way
    assert gate.state.threshold == pytest.approx(before - under_way * gate.allowed * gate.options.step)
    drive(policy, 30)
    assert policy.stats()["audits"] > 0


def test_executed_audits_are_refused():
    gate = LiveGate(Always(), [0.1], 0.5, 0.05, SPACE, 0.2, LiveOptions())
    with pytest.raises(InputError) as caught:
        bridge(gate)
    assert caught.value.field == "executed"


# --------------------------------------------------------------------------------------------------------- the thread


class Slow(Clock):
    """Answers when it is allowed to, or raises what it is told to."""

    def __init__(self):
        super().__init__()
        self.go, self.asked, self.error = threading.Semaphore(0), threading.Semaphore(0), None

    def predict(self, observation, keep_mass=1.0):
        self.asked.release()
        assert self.go.acquire(timeout=20)
        if self.error is not None:
            raise self.error
        return super().predict(observation)


def threaded(gate=None, **options):
    vla = Slow()
    return vla, BridgePolicy(vla, LastActionGenerator(SPACE), gate or Always(), space=SPACE, **options)


def tick(policy, step):
    return policy.tick(lambda: Observation(state=state(step)), state(step))


def answered(policy):
    """Let the call under way be answered."""
    policy.vla.go.release()
    policy.calls.wait()


def test_no_tick_waits_for_a_vla_that_hangs():
    _, policy = threaded(max_generated_run=5)
    policy.reset("go")
    assert tick(policy, 0) is None and tick(policy, 1) is None
    answered(policy)
    assert [tick(policy, step) is not None for step in range(2, 30)] == 28 * [True]
    assert sources(policy) == "HHVGGGGG" + 22 * "H" and asked(policy)[0] == 0 and len(asked(policy)) == 2
    answered(policy)
    with pytest.warns(UserWarning, match="the robot will stand"):
        tick(policy, 30)  # the answer is about a state long left: the robot asks again, where it stands now
    assert sources(policy)[-1] == "H" and asked(policy)[-1] == 30
    answered(policy)
    tick(policy, 31)
    assert sources(policy)[-1] == "V"


def test_answers_of_an_earlier_episode_never_come():
    vla, policy = threaded()
    policy.reset("go")
    tick(policy, 0)
    policy.reset("other")
    assert tick(policy, 100) is None
    vla.go.release()  # of the first episode's call, which the thread finishes first
    vla.asked.acquire(timeout=20)
    assert vla.asked.acquire(timeout=20) and tick(policy, 101) is None
    answered(policy)
    action = tick(policy, 102)
    assert vla.seen == [0, 100] and action[0] == pytest.approx(1.0)


def test_what_the_vla_raises_ends_the_episode_unless_it_is_unavailable():
    vla, policy = threaded()
    policy.reset("go")
    tick(policy, 0)
    vla.error = VLAUnavailable("away")
    answered(policy)
    assert tick(policy, 1) is None and policy.last_step.unavailable == "away" and asked(policy) == [0, 1]
    vla.error = None
    answered(policy)
    assert tick(policy, 2) is not None and policy.last_step.unavailable is None
    vla.error = ZeroDivisionError("a bug")
    policy.reset("go")
    tick(policy, 0)
    answered(policy)
    with pytest.raises(ZeroDivisionError):
        tick(policy, 1)


def test_select_action_waits_for_the_first_answer_alone():
    vla = Clock()
    policy = BridgePolicy(vla, LastActionGenerator(SPACE), Always(), space=SPACE)
    policy.reset("go")
    actions = [policy.select_action(Observation(state=state(step))) for step in range(5)]
    assert all(a is not None for a in actions) and sources(policy) == "VGGGG" and vla.seen == [0]
    vla.predict = lambda observation, keep_mass=1.0: (_ for _ in ()).throw(VLAUnavailable("away"))
    policy.reset("go")
    with pytest.raises(VLAUnavailable):
        for _ in range(50):
            policy.select_action(Observation(state=state(0)))


def test_the_observation_is_the_one_of_the_step_that_asked_even_if_the_call_has_to_wait_for_its_turn():
    vla, policy = threaded(live(audit=0.999, start=1.0))
    policy.reset("go")
    tick(policy, 0)
    answered(policy)
    for step in range(1, 3 + MOST_AUDITS):
        tick(policy, step)
    steps = [call.step for call, _ in policy.calls._calls]
    assert len(steps) == 1 + MOST_AUDITS
    for _ in steps:
        answered(policy)
        policy._take_in(policy.calls.answers(50))
    assert vla.seen == [0, *steps]


# ------------------------------------------------------------------------------------------------------------ by name


def test_modes_are_chosen_by_name_and_what_cannot_be_joined_is_refused():
    policy = accelerate(Clock(), generator="last", gate="release", mode="bridge")
    assert isinstance(policy, BridgePolicy)
    for bad in ({"shadow": True}, {"when_unavailable": "stop"}, {"mode": "sometimes"}):
        with pytest.raises(InputError) as caught:
            accelerate(Clock(), generator="last", gate="release", **{"mode": "bridge", **bad})
        assert caught.value.field == "mode"
    cell, paused = parse_cells(["ridge+release:bridge", "vla:paused"], [None])[1:]
    assert (cell.mode, cell.name, paused.name) == ("bridge", "ridge+release:bridge", "vla:paused")
    with pytest.raises(InputError) as caught:
        parse_cells(["ridge+release:fast"], [None])
    assert caught.value.code == "unknown-name"


def test_a_late_answer_in_the_history():
    history = ActionHistory(SPACE, 3)
    for step in range(4):
        history.observe(state(step))
        history.act(np.full(7, step / 10, np.float32), Source.GENERATOR)
    history.observe(state(4))
    history.answer(VLAOutput(np.full((1, 7), 0.5, np.float32)), state(1), 3)
    window = history.window()
    assert window.vla_age[0] == 3 and window.vla_action[0, 0] == pytest.approx(0.5)
    np.testing.assert_array_equal(window.vla_state[0], state(1))
    history.act(np.zeros(7, np.float32), Source.GENERATOR)
    history.observe(state(5))
    assert history.window().vla_age[0] == 4
