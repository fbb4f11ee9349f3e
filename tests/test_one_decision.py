"""A robot, evaluation without a simulator and calibration make one decision about a proposal."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data.store import RolloutStore
from data.windows import Windows
from eval.offline import judge_store
from spvla.actions import LIBERO
from spvla.export import Export
from spvla.gates.calibration import Calibration, calibrate
from spvla.gates.classifier import ActionTypeClassifier, ClassifierConfig, LearnedGate, judge
from spvla.generators import make_network
from spvla.generators.features import FeatureConfig
from spvla.generators.learned import GeneratorConfig
from spvla.history import ActionHistory, Source
from spvla.observation import Observation
from spvla.recording import Recorder
from spvla.shadow import ShadowPolicy
from spvla.store import RolloutWriter
from spvla.vlas.base import VLAOutput
from tests.conftest import smooth_episode
from train.calibrate import calibration_curve, choose_default, judge_episode
from train.datamodules import RolloutData

HISTORY, TOLERANCE = 6, 0.2
FEATURES = FeatureConfig(7, HISTORY, (0, 1, 2), (-0.4,) * 3, (0.4,) * 3, state_lags=(1,))


def episode(seed, sources):
    """An episode with sources 0, 1 and 2, a sensor that fails for some steps, and an arm that is pushed about."""
    g = np.random.default_rng(seed)
    made = smooth_episode(seed, steps=len(sources))
    made.sources = np.array(sources, np.uint8)
    made.states = made.states.copy()
    made.states[20:26, 1] = 1e3  # unfamiliar
    made.actions[:, :3] = g.uniform(-0.6, 0.6, (len(sources), 3))
    made.vla_actions[made.sources == Source.HELD] = np.nan
    made.metadata = {}
    return made


def some_sources(seed, steps=60):
    g = np.random.default_rng(seed)
    sources = g.choice([Source.VLA, Source.GENERATOR, Source.HELD], steps, p=[0.5, 0.3, 0.2])
    sources[0] = Source.VLA
    sources[27:29] = Source.HELD
    return sources


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    writer = RolloutWriter(tmp_path_factory.mktemp("decision") / "store", LIBERO, policy="synthetic")
    for seed in range(6):
        writer.write(f"job-{seed}", [episode(seed, some_sources(seed))])
    return writer.finalize()


@pytest.fixture(scope="module")
def export():
    """A generator and a gate that say something different at every step, and a limit that refuses some proposals."""
    torch.manual_seed(1)
    generator = make_network(vars(GeneratorConfig("mlp", FEATURES, (6,), 1, 16, 2)))
    gate = ActionTypeClassifier(ClassifierConfig(FEATURES, 16, 2))
    with torch.no_grad():
        for p in [*generator.parameters(), *gate.parameters()]:
            p.mul_(3.0)
    curve = Calibration((0.5,), (0.05,), (0.5,), (0.0,), 20)
    defaults = {"generator": "mlp", "gate": "learned", "risk": 0.1, "max_generated_run": 10_000}
    space = LIBERO.with_max_jump(np.full(7, 1.1))
    return Export(space, TOLERANCE, {"mlp": generator}, {"mlp": gate}, {"mlp": curve}, defaults)


def online(export, gate, recorded):
    """Replay what was executed, step for step, asking the gate before each step."""
    generator, history = export.generator("mlp", LIBERO), ActionHistory(LIBERO, HISTORY)
    decisions = []
    for t, action in enumerate(recorded.actions):
        history.observe(recorded.states[t])
        decisions.append(gate.decide(window := history.window(), generator.propose(window)[:, 0])[0])
        source = Source(recorded.sources[t])
        output = VLAOutput(recorded.vla_actions[t][None]) if source == Source.VLA else None
        history.act(action, source, output)
    return decisions


def between(values):
    """A threshold in the middle of the widest gap of the middle half: batches of other sizes round differently."""
    v = np.sort(values[np.isfinite(values)])
    v = v[len(v) // 4 : 3 * len(v) // 4]
    k = int(np.diff(v).argmax())
    assert v[k + 1] - v[k] > 1e-5
    return float(v[k] + v[k + 1]) / 2


def test_the_three_ways_agree_at_every_step(store, export):
    limits = export.limits("mlp", LIBERO)
    windows = Windows([RolloutStore(store)], HISTORY)
    judged = judge_store(windows, export, ["mlp"])
    offline = judged.verdicts["mlp"]
    threshold = between(offline.lowest_threshold)
    classifier, generator = export.gates["mlp"], export.generator("mlp", LIBERO)
    gate = replace(LearnedGate.from_export(export, "mlp", 0.1, LIBERO), threshold=threshold)
    data = RolloutData([store], HISTORY)
    reasons, refusals = [], 0
    for e, (_, first, info) in enumerate(windows.episodes):
        recorded = episode(e, some_sources(e))
        decisions = online(export, gate, recorded)
        acts = np.array([d.intuitive and not d.refused for d in decisions])
        rows = judged.episode == e
        np.testing.assert_array_equal(offline.generated(threshold)[rows], acts[1:])
        np.testing.assert_array_equal(offline.refused(threshold)[rows], [d.refused for d in decisions[1:]])
        lowest, deviates = judge_episode(data.seen, generator, classifier, first, info.length, TOLERANCE, limits)
        labelled = recorded.sources != Source.HELD
        np.testing.assert_array_equal(lowest <= threshold, acts & labelled)  # nobody knows what the VLA would have done
        assert np.isinf(lowest[0]) and not deviates[~labelled].any()
        reasons += [d.reason for d in decisions]
        refusals += sum(d.refused for d in decisions)
        assert decisions[0].reason == "first step" and not decisions[0].intuitive
        assert all(d.reason == "unfamiliar state" and not d.intuitive for d in decisions[20:26])
    assert refusals > 10 and reasons.count("classifier") > 100 and offline.generated(threshold).sum() > 10


def test_the_policy_in_shadow_mode_agrees_with_the_store_that_it_records(export, tmp_path):
    """VLA steps and waits; what was executed differs from what the VLA said."""
    torch.manual_seed(2)
    recorded = [episode(seed, np.where(some_sources(seed) == Source.HELD, 2, 0)) for seed in range(3)]

    class Teacher:
        action_space, needs_images = LIBERO, False

        def reset(self, instruction):
            pass

        def predict(self, observation, keep_mass=1.0):
            return VLAOutput(self.label[None])

    vla = Teacher()
    probe = [p.probability for r in recorded for p in online(export, LearnedGate.from_export(export, "mlp", 0.1, LIBERO), r)]
    gate = replace(LearnedGate.from_export(export, "mlp", 0.1, LIBERO), threshold=between(np.array(probe)))
    policy = ShadowPolicy(
        *(vla, export.generator("mlp", LIBERO), gate),
        **{"space": export.limits("mlp", LIBERO), "max_generated_run": 10_000},
    )
    policy = Recorder(policy, tmp_path / "shadow")
    steps = []
    for r in recorded:
        policy.reset(r.instruction)
        for t, action in enumerate(r.actions):
            if r.sources[t] == Source.HELD:
                policy.waited(action, r.states[t])
            else:
                vla.label = r.vla_actions[t]
                policy.select_action(Observation(None, r.states[t]))
                policy.executed(action)
        steps.append(list(policy.steps))
    policy.close()

    windows = Windows([RolloutStore(tmp_path / "shadow")], HISTORY)
    offline = judge_store(windows, export, ["mlp"])
    asked = np.concatenate([[s.source == Source.VLA for s in e[1:]] for e in steps])
    skipped = np.concatenate([[s.intuitive and not s.fallback for s in e[1:]] for e in steps])
    refused = np.concatenate([[s.fallback for s in e[1:]] for e in steps])
    verdicts = offline.verdicts["mlp"]
    np.testing.assert_array_equal(verdicts.generated(gate.threshold)[asked], skipped[asked])
    np.testing.assert_array_equal(verdicts.refused(gate.threshold)[asked], refused[asked])
    assert skipped.sum() > 5 and refused.sum() > 5 and (~asked).sum() > 5


def test_refused_and_unfamiliar_steps_add_to_neither_coverage_nor_risk(store, export):
    """The curve, against every step counted one by one."""
    data, gate, generator = RolloutData([store], HISTORY), export.gates["mlp"], export.generator("mlp", LIBERO)
    limits = export.limits("mlp", LIBERO)
    curve = calibration_curve(data, generator, gate, TOLERANCE, limits)
    loose = calibration_curve(data, generator, gate, TOLERANCE, LIBERO)
    nothing = calibration_curve(data, generator, gate, TOLERANCE, LIBERO.with_max_jump(np.zeros(7)))
    coverage = []
    for first, length in data.split.calibration:
        recorded = episode(first // length, some_sources(first // length))
        verdicts = judge(gate, limits, *window_and_proposals(data, generator, first, length))
        allowed = verdicts.familiar & verdicts.admissible & (recorded.sources != Source.HELD)
        allowed[0] = False
        coverage.append(allowed.mean())
    assert curve.coverage[-1] == pytest.approx(np.mean(coverage)) and 0 < curve.coverage[-1] < loose.coverage[-1] < 1
    assert nothing.coverage_at(1.0) == 0 and nothing.risk[-1] == pytest.approx(nothing.smallest_risk)


def window_and_proposals(data, generator, first, length):
    window = data.windows.batch(np.arange(first, first + length)).window
    return window, np.ascontiguousarray(generator.propose(window)[:, 0])


def test_nan_and_infinity_never_act(export):
    """A proposal or probability that is no number."""
    history = ActionHistory(LIBERO, HISTORY)
    history.observe(np.zeros(3))
    history.act(np.zeros(7, np.float32), Source.VLA)
    history.observe(np.zeros(3))
    for bad in (np.nan, np.inf, -np.inf):
        proposal = np.zeros((1, 7), np.float32)
        proposal[0, 2] = bad
        verdicts = judge(export.gates["mlp"], export.limits("mlp", LIBERO), history.window(), proposal)
        assert verdicts.started[0] and verdicts.familiar[0] and not verdicts.admissible[0]
        assert not verdicts.generated(1.0)[0] and np.isinf(verdicts.lowest_threshold[0])
    unbounded = replace(LIBERO, low=(-np.inf,) * 7, high=(np.inf,) * 7)
    assert unbounded.admissible(np.full(7, 1e30, np.float32), None)
    assert not unbounded.admissible(np.full(7, np.inf, np.float32), None)


def curve(covers, episodes=50):
    """A generator that may act on a share ``covers`` of the steps without a deviation."""
    steps = np.full(100, np.inf)
    steps[: int(100 * covers)] = 0.3
    return calibrate([steps] * episodes, [np.zeros(100, bool)] * episodes)


@pytest.mark.parametrize(
    ("covers", "errors", "risk", "chosen"),
    [
        ({"mlp": 0.4, "ridge": 0.6}, {"mlp": 0.1, "ridge": 0.2}, 0.05, "ridge"),
        ({"mlp": 0.6, "ridge": 0.4}, {"mlp": 0.2, "ridge": 0.1}, 0.05, "mlp"),
        ({"mlp": 0.5, "last": 0.5}, {"mlp": 0.2, "last": 0.1}, 0.05, "last"),  # a tie
        ({"mlp": 0.9, "ridge": 0.1}, {"mlp": 0.2, "ridge": 0.1}, 0.01, "ridge"),  # 50 episodes are too few for 0.01
        ({"mlp": 0.0, "ridge": 0.0, "last": 0.0}, {"mlp": 0.2, "ridge": 0.1, "last": 0.3}, 0.05, "ridge"),
    ],
)
def test_the_default_is_what_the_calibration_episodes_favour(covers, errors, risk, chosen):
    assert choose_default({name: curve(share) for name, share in covers.items()}, errors, risk) == chosen
