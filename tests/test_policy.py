"""The control loop: who acts, what is recorded, and that the VLA is untouched when everything is off."""

from dataclasses import replace

import numpy as np
import pytest

from data.store import RolloutStore
from spvla import InputError, Observation, SPVLAPolicy, accelerate
from spvla.actions import LIBERO, ActionSpace
from spvla.gates.base import Decisions
from spvla.gates.rules import PaperRule, ReleaseRule
from spvla.generators.ridge import LastActionGenerator, RidgeGenerator
from spvla.history import Source
from spvla.pruning import make_pruner
from spvla.recording import Recorder
from spvla.shadow import ShadowPolicy
from spvla.steps import run_lengths
from spvla.store import read_episodes
from spvla.vlas.base import VLAUnavailable
from tests.conftest import PrunableVLA, ScriptedVLA


class Always:
    """A gate that calls every step intuitive."""

    history_length = 1

    def decide(self, window, proposals):
        return Decisions(np.array([True]), np.array(["always"]), np.array([0.25]))


class Fixed:
    """A generator that proposes one action."""

    history_length, space = 1, LIBERO

    def __init__(self, action):
        self.action = LIBERO.normalize(np.asarray(action, np.float32))

    def propose(self, window):
        return self.action[None, None]


def actions(steps=50, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (steps, 7)).astype(np.float32)


def run(policy, steps, state=True):
    policy.reset("do it")
    g = np.random.default_rng(1)
    return np.array([policy.select_action(Observation(state=g.normal(size=8) if state else None)) for _ in range(steps)])


def sources(policy):
    return "".join("VGH"[s.source] for s in policy.steps)


@pytest.mark.parametrize("chunk", [1, 4])
def test_everything_off_is_the_vla_bit_for_bit(chunk):
    vla = ScriptedVLA(actions(48), chunk=chunk)
    np.testing.assert_array_equal(run(SPVLAPolicy(vla), 48), vla.actions)
    assert vla.calls == 48 // chunk


def test_shadow_mode_is_the_vla_bit_for_bit_and_tells_what_it_would_do():
    vla = ScriptedVLA(np.tile(actions(1), (30, 1)))
    policy = ShadowPolicy(vla, LastActionGenerator(LIBERO), Always())
    np.testing.assert_array_equal(run(policy, 30), vla.actions)
    stats = policy.stats()
    counts = [stats[k] for k in ("vla_calls", "generated", "would_skip", "would_deviate")]
    assert counts == [30, 0, 28, 0]  # not the first step, nor the one beyond the run limit of 20
    noisy = ShadowPolicy(ScriptedVLA(actions(30)), LastActionGenerator(LIBERO), Always())
    out = run(noisy, 30)
    expected = np.delete(LIBERO.deviation(out[:-1], out[1:], 0.2), 20).sum()  # step 21 is beyond the run limit
    assert noisy.stats()["would_deviate"] == expected > 20


def test_shadow_mode_counts_what_an_acting_policy_would_skip():
    """On a motion that the generator continues exactly, both see the same actions and must come to the same count."""
    vla = ScriptedVLA(np.tile([0.3, 0.2, 0, 0, 0, 0, -1], (60, 1)).astype(np.float32))
    for gate in (ReleaseRule(LIBERO), PaperRule(LIBERO, v_min=0.0), Always()):
        shadow, acting = (made(vla, LastActionGenerator(LIBERO), gate) for made in (ShadowPolicy, SPVLAPolicy))
        run(shadow, 60), run(acting, 60)
        assert shadow.stats()["would_skip"] == acting.stats()["generated"] > 20
        assert shadow.stats()["generated"] == 0


def test_two_recorders_fill_one_store(tmp_path):
    policies = [Recorder(SPVLAPolicy(ScriptedVLA(actions(5, seed))), tmp_path / "s") for seed in (0, 1)]
    for _ in range(3):
        for policy in policies:
            run(policy, 5)
            policy.finish(success=True)
    for policy in policies:
        policy.close()
    starts = sorted(float(e.actions[0, 0]) for e in read_episodes(tmp_path / "s"))
    assert starts == sorted(3 * [float(actions(5, seed)[0, 0]) for seed in (0, 1)])


def test_the_vla_acts_first_and_after_a_full_run():
    policy = SPVLAPolicy(ScriptedVLA(actions()), LastActionGenerator(LIBERO), Always(), max_generated_run=3)
    run(policy, 12)
    assert sources(policy) == "VGGG" * 3
    assert [s.reason for s in policy.steps[:5]] == ["first step", "always", "always", "always", "run limit"]
    stats = policy.stats()
    assert (stats["vla_calls"], stats["generated"], stats["switches"]) == (3, 9, 5)
    assert stats["generated_run_length_mean"] == 3


@pytest.mark.parametrize("bad", [np.full(7, np.nan), np.full(7, np.inf), np.full(7, 1.5)])
def test_an_inadmissible_proposal_falls_through_to_the_vla_in_the_same_step(bad):
    vla = ScriptedVLA(actions())
    policy = SPVLAPolicy(vla, Fixed(bad), Always())
    np.testing.assert_array_equal(run(policy, 10), vla.actions[:10])
    assert policy.stats()["fallbacks"] == 9 and all(s.reason == "refused" for s in policy.steps[1:])


def test_a_larger_jump_than_seen_is_refused():
    still = np.zeros((20, 7), np.float32)
    policy = SPVLAPolicy(ScriptedVLA(still), Fixed(np.full(7, 0.5)), Always(), space=LIBERO.with_max_jump(np.full(7, 0.4)))
    np.testing.assert_array_equal(run(policy, 5), still[:5])
    assert policy.stats()["fallbacks"] == 4


def test_no_image_is_captured_on_intuitive_steps():
    captured = []

    def camera():
        captured.append(1)
        return Observation(np.zeros((4, 4, 3), np.uint8))

    policy = SPVLAPolicy(ScriptedVLA(actions()), LastActionGenerator(LIBERO), Always(), max_generated_run=4)
    policy.reset("look")
    for _ in range(10):
        policy.select_action(camera, state=np.zeros(8))
    assert len(captured) == 2


def test_the_actions_of_a_chunk_are_labels_of_their_steps(tmp_path):
    planned = actions(12)
    policy = Recorder(SPVLAPolicy(ScriptedVLA(planned, chunk=4)), tmp_path)
    policy.reset("x")
    for step in range(6):
        policy.select_action(Observation(state=np.zeros(8)))
        policy.executed(np.full(7, 0.5, np.float32))
        assert policy.last_output is not None and (policy.last_output.actions[0] == planned[step]).all()
    policy.close()
    (episode,) = read_episodes(tmp_path)
    np.testing.assert_array_equal(episode.vla_actions, planned[:6])
    np.testing.assert_array_equal(episode.actions, np.full((6, 7), 0.5, np.float32))


def test_a_recording_holds_what_the_history_held_while_a_chunk_was_played(tmp_path):
    class Sure(ScriptedVLA):
        def predict(self, observation, keep_mass=1.0):
            confidence = np.full(7, 0.1 * (self.calls + 1), np.float32)
            return replace(super().predict(observation), confidence=confidence)

    policy = Recorder(SPVLAPolicy(Sure(actions(8), chunk=4)), tmp_path)
    policy.reset("x")
    held = []
    for _ in range(8):
        policy.select_action(Observation(state=np.zeros(8)))
        held.append(policy.history.window().vla_confidence[0])
    policy.close()
    (episode,) = read_episodes(tmp_path)
    np.testing.assert_array_equal(episode.vla_confidence, held)
    np.testing.assert_allclose(episode.vla_confidence[:, 0], [0.1] * 4 + [0.2] * 4)


def test_chunks_are_played_out_before_anyone_decides():
    policy = SPVLAPolicy(ScriptedVLA(actions(), chunk=3), LastActionGenerator(LIBERO), Always(), max_generated_run=2)
    run(policy, 10)
    assert sources(policy) == "VVVGGVVVGG"
    assert policy.stats()["vla_calls"] == 2


def test_executed_tells_the_history_what_really_happened():
    policy = SPVLAPolicy(ScriptedVLA(actions()), LastActionGenerator(LIBERO), Always())
    policy.reset("be safe")
    policy.select_action(Observation())
    policy.executed(np.full(7, 0.125, np.float32))
    np.testing.assert_array_equal(policy.select_action(Observation()), np.full(7, 0.125, np.float32))


def test_the_release_cap_holds_in_the_loop():
    straight = np.tile(np.float32([0.5, 0.2, 0, 0, 0, 0, 1]), (70, 1))
    policy = SPVLAPolicy(ScriptedVLA(straight), RidgeGenerator(LIBERO), ReleaseRule(LIBERO))
    run(policy, 70)
    assert sources(policy) == "VVVVGGG" * 10
    assert policy.stats()["vla_calls"] == 40


def test_pruning_reaches_the_vla_and_every_step_says_how_many_tokens():
    vla = PrunableVLA(np.tile(np.float32([0, 0, 0.75, 0, 0, 0, 1]), (5, 1)))
    for pruning in ("fast_fewer", make_pruner("fast_fewer"), {"speed": "fast_fewer", "z_min": 0.9}):
        policy = accelerate(vla, generator="none", pruning=pruning)
        run(policy, 3)
        assert policy.vla is not vla and vla.pruner is None
        assert policy.vla.asked == [1.0, pytest.approx(0.55), pytest.approx(0.55)]
        assert [s.visual_tokens for s in policy.steps] == [(256, 256), (141, 256), (141, 256)]
        assert policy.steps[1].keep_mass == pytest.approx(0.55)
    assert accelerate(vla, generator="none", pruning="none").vla is vla


def test_pruning_is_refused_where_it_cannot_be():
    with pytest.raises(InputError, match=r"ScriptedVLA cannot run on fewer visual tokens"):
        accelerate(ScriptedVLA(actions()), generator="none", pruning="fast_fewer")
    joints = ActionSpace("arm", "joint_position", 10.0, (-1.0,) * 3, (1.0,) * 3, (-1.0,) * 3, (1.0,) * 3)
    with pytest.raises(InputError, match=r"'fast_fewer' needs a vertical translation"):
        accelerate(PrunableVLA(np.zeros((3, 3)), joints), generator="none", pruning="fast_fewer")
    for pruning, message in [
        ("often", r"pruning 'often' is unknown; available: none, fast_fewer, slow_fewer"),
        (0.5, r"pruning must be Pruner or a map or a text or null, got 0.5"),
        ({"speed": ["slow_fewer"]}, r"speed \['slow_fewer'\] is not one of"),
        ({"ratio": 0.5}, r"field 'ratio' is unknown for speed 'fast_fewer'; available: speed, z_threshold,"),
        ({"speed": "constant", "keep": "half"}, "pruning: keep must be a finite number"),
    ]:
        with pytest.raises(InputError, match=message):
            accelerate(PrunableVLA(actions()), generator="none", pruning=pruning)


def test_misuse_is_told():
    with pytest.raises(InputError, match="give both or neither"):
        SPVLAPolicy(ScriptedVLA(actions()), generator=LastActionGenerator(LIBERO))
    with pytest.raises(InputError, match="reset"):
        SPVLAPolicy(ScriptedVLA(actions())).select_action(Observation())
    policy = SPVLAPolicy(ScriptedVLA(np.full((3, 7), np.nan)))
    policy.reset("x")
    with pytest.raises(InputError, match="NaN"):
        policy.select_action(Observation())
    policy = SPVLAPolicy(ScriptedVLA(actions()))
    policy.reset("x")
    policy.select_action(Observation(state=np.zeros(8)))
    with pytest.raises(InputError, match="8"):
        policy.select_action(Observation(state=np.zeros(7)))
    with pytest.raises(InputError, match="NaN"):
        policy.select_action(Observation(state=np.full(8, np.nan)))
    with pytest.raises(InputError, match="needs an export"):
        accelerate(ScriptedVLA(actions()), gate="learned")
    with pytest.raises(InputError, match="z_xy"):
        accelerate(ScriptedVLA(actions()), gate="release", rule={"z_xy": 1})


class Flaky(ScriptedVLA):
    """Cannot be asked while its count of calls lies in ``down``."""

    down = range(0)
    asked = 0

    def predict(self, observation, keep_mass=1.0):
        self.asked += 1
        if self.asked - 1 in self.down:
            raise VLAUnavailable("no answer in 0.5 s")
        return super().predict(observation, keep_mass)


def flaky(down, when, run_limit=3):
    vla = Flaky(actions())
    vla.down = down
    policy = SPVLAPolicy(vla, LastActionGenerator(LIBERO), Always(), max_generated_run=run_limit, when_unavailable=when)
    return vla, policy


@pytest.mark.parametrize("when", ["stop", "hold", "generator"])
def test_while_the_vla_does_not_answer_the_action_is_safe_and_then_it_is_the_vlas_again(when):
    vla, policy = flaky(range(1, 6), when)
    policy.reset("be careful")
    out = np.array([policy.select_action(Observation(state=np.zeros(3))) for _ in range(13)])
    down = [s.unavailable is not None for s in policy.steps]
    assert down == [False] * 4 + [True] * 5 + [False] * 4, "asked at every step until it answers"
    assert all("0.5 s" in s.unavailable and s.reason == "unavailable" for s in policy.steps[4:9])
    assert [s.source for s in policy.steps[4:9]] == [Source.HELD] * 5  # the run was used up before
    safe = np.where(np.arange(7) == 6, out[3], 0) if when != "hold" else out[3]
    np.testing.assert_array_equal(out[4:9], np.tile(safe, (5, 1)))
    np.testing.assert_array_equal(out[9], vla.actions[1])
    assert [s.source for s in policy.steps[9:]] == [Source.VLA, *[Source.GENERATOR] * 3]
    stats = policy.stats()
    assert (stats["unavailable"], stats["vla_calls"], stats["held"]) == (5, 2, 5)


def test_the_generator_goes_on_within_its_limit_while_the_vla_does_not_answer():
    class Never(Always):
        def decide(self, window, proposals):
            return Decisions(np.array([False]), np.array(["never"]))

    vla, policy = flaky(range(2, 100), "generator", run_limit=4)
    policy.gate = Never()
    run(policy, 9)
    assert sources(policy) == "VVGGGGHHH"
    vla.down = range(0)
    policy.select_action(Observation(state=np.zeros(8)))
    assert policy.last_step.source == Source.VLA and policy.last_step.unavailable is None


def test_nothing_is_safe_before_the_first_action_and_raising_is_the_default():
    for down, when in ((range(0, 9), "stop"), (range(1, 9), "raise")):
        vla, policy = flaky(down, when)
        policy.reset("x")
        with pytest.raises(VLAUnavailable, match="no answer"):
            for _ in range(5):
                policy.select_action(Observation(state=np.zeros(8)))
        vla.down = range(0)
        policy.select_action(Observation(state=np.zeros(8)))
        assert policy.last_step.source == Source.VLA
    with pytest.raises(InputError, match="when_unavailable 'pray' is not one of raise, stop, hold, generator"):
        SPVLAPolicy(ScriptedVLA(actions()), when_unavailable="pray")


def test_a_step_that_failed_leaves_no_trace_in_the_history():
    class Choosy(ScriptedVLA):
        def predict(self, observation, keep_mass=1.0):
            observation.require_image()
            return super().predict(observation, keep_mass)

    image = np.zeros((4, 4, 3), np.uint8)
    seen = []
    for stumble in (False, True):
        policy = SPVLAPolicy(Choosy(actions()), RidgeGenerator(LIBERO), ReleaseRule(LIBERO))
        policy.reset("x")
        for t in range(6):
            if stumble:
                with pytest.raises(InputError, match="needs an image"):
                    policy.select_action(Observation(None, np.full(3, 7.0)))
            policy.select_action(Observation(image, np.full(3, t)))
        seen.append(policy.history.states.copy())
        assert policy.history.steps == len(policy.steps) == 6
    np.testing.assert_array_equal(*seen)


def test_recorded_episodes_are_a_store_that_training_reads(tmp_path):
    policy = accelerate(ScriptedVLA(actions()), generator="last", gate="release", record=tmp_path / "rec")
    for success in (True, False):
        run(policy, 20)
        policy.finish(success=success, site="lab 3")
    policy.close()
    store = RolloutStore(tmp_path / "rec")
    assert [e.success for e in store.episodes] == [True, False] and store.episodes[0].metadata["site"] == "lab 3"
    assert store.frames == 40
    generated = store.arrays["sources"] == Source.GENERATOR
    assert np.isnan(store.arrays["targets"][generated]).all() and not np.isnan(store.arrays["targets"][~generated]).any()


def test_run_lengths():
    assert run_lengths(np.array([0, 1, 1, 0, 1, 0, 0, 1, 1, 1], bool)).tolist() == [2, 1, 3]
    assert run_lengths(np.zeros(0, bool)).tolist() == []
