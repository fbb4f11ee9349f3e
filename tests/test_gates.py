"""Rules against their published patterns, conformal calibration against its guarantee."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spvla.actions import LIBERO, ActionSpace
from spvla.errors import InputError
from spvla.gates.calibration import Calibration, calibrate, worst_of
from spvla.gates.classifier import ActionTypeClassifier, ClassifierConfig, LearnedGate
from spvla.gates.rules import PaperRule, ReleaseRule
from spvla.generators.features import FeatureConfig
from spvla.history import ActionHistory, Source

PROPOSALS = np.zeros((1, 7), np.float32)


def pattern(rule, action, steps):
    history, out = ActionHistory(LIBERO, 6), ""
    for _ in range(steps):
        history.observe(None)
        source = Source.GENERATOR if rule.decide(history.window(), PROPOSALS)[0].intuitive else Source.VLA
        history.act(np.asarray(action, np.float32), source)
        out += "VG"[source]
    return out


def test_release_rule_is_capped_at_three_sevenths():
    out = pattern(ReleaseRule(LIBERO), (0.5, 0.1, 0, 0, 0, 0, 1), 70)
    assert out == "VVVVGGG" * 10


def test_release_rule_reads_planarity():
    steep, tall = (0.1, 0.1, 0.2, 0, 0, 0, 1), (0.9, 0.9, 0.51, 0, 0, 0, 1)
    assert "G" not in pattern(ReleaseRule(LIBERO), steep, 30)
    assert "G" not in pattern(ReleaseRule(LIBERO, z_max=0.5), tall, 30)
    assert "G" in pattern(ReleaseRule(LIBERO, z_max=0.6), tall, 30)
    assert "G" in pattern(ReleaseRule(LIBERO), np.zeros(7), 30)  # the published hole: a standing arm counts as planar


def test_paper_rule_reads_speed_and_share():
    rule = PaperRule(LIBERO, v_min=0.1, v_max=0.8)
    moving = pattern(rule, (0.5, 0.5, 0.5, 0, 0, 0, 1), 60)
    assert moving.startswith("VG") and 0.4 <= moving.count("G") / 60 <= 0.5  # tau: over half of the buffer is the VLA's
    assert "G" not in pattern(rule, (0.5, 0.05, 0.5, 0, 0, 0, 1), 30)
    assert "G" not in pattern(rule, (0.5, 0.9, 0.5, 0, 0, 0, 1), 30)


def test_rules_refuse_spaces_without_translation():
    joints = ActionSpace("arm", "joint_velocity", 10, (-1,) * 3, (1,) * 3, (-1,) * 3, (1,) * 3)
    for rule in (PaperRule, ReleaseRule):
        with pytest.raises(InputError, match="translation"):
            rule(joints)


def curve_by_hand(p, bad, threshold):
    loss = [np.mean((np.asarray(a) <= threshold) & np.asarray(b)) for a, b in zip(p, bad, strict=True)]
    return (sum(loss) + 1) / (len(loss) + 1)


@given(st.integers(1, 8), st.integers(0, 10**6))
@pytest.mark.slow
def test_calibration_agrees_with_the_definition(n, seed):
    g = np.random.default_rng(seed)
    p = [g.random(g.integers(1, 9)) for _ in range(n)]
    bad = [g.random(len(x)) < 0.5 for x in p]
    curve = calibrate(p, bad)
    assert list(curve.risk) == sorted(curve.risk) and list(curve.coverage) == sorted(curve.coverage)
    for threshold, risk, coverage in zip(curve.thresholds, curve.risk, curve.coverage, strict=True):
        assert risk == pytest.approx(curve_by_hand(p, bad, threshold))
        assert coverage == pytest.approx(np.mean([np.mean(x <= threshold) for x in p]))
    assert curve.smallest_risk == 1 / (n + 1)


@settings(max_examples=5)
@given(st.integers(0, 10**6), st.sampled_from([0.05, 0.1, 0.2]))
@pytest.mark.slow
def test_the_risk_of_new_episodes_stays_below_the_allowed_one(seed, risk):
    """Conformal risk control: on average over calibration sets, a fresh episode's loss is at most the allowed risk."""
    g = np.random.default_rng(seed)

    def draw(n):
        p = g.random((n, 30))
        return list(p), list(g.random((n, 30)) < p * g.random((n, 1)))

    losses = []
    for _ in range(60):
        threshold = calibrate(*draw(40)).threshold(risk)
        p, bad = draw(200)
        losses.append(np.mean([(a <= threshold) & b for a, b in zip(p, bad, strict=True)]))
    assert np.mean(losses) <= risk + 3 * np.std(losses) / np.sqrt(len(losses))


def test_too_few_episodes_are_told_and_thresholds_grow_with_risk():
    g = np.random.default_rng(0)
    p = [g.random(50) for _ in range(19)]
    curve = calibrate(p, [g.random(50) < x for x in p])
    with pytest.raises(InputError, match=r"19 calibration episodes: the smallest possible is 0\.0500"):
        curve.threshold(0.02)
    thresholds = [curve.threshold(r) for r in (0.05, 0.06, 0.1, 0.2, 0.5, 1.0)]
    assert thresholds == sorted(thresholds) and thresholds[-1] == curve.thresholds[-1]
    always_wrong = calibrate([[0.5]] * 19, [[True]] * 19)
    assert always_wrong.threshold(0.9) == -1.0  # nothing is allowed: no step is intuitive
    with pytest.raises(InputError, match="risk must lie"):
        curve.threshold(0)
    assert Calibration.from_dict(curve.to_dict()) == curve
    with pytest.raises(InputError, match="coverage"):
        Calibration.from_dict({k: v for k, v in curve.to_dict().items() if k != "coverage"})


def test_pools_are_combined_by_the_worse():
    thresholds = np.array([0.2, 0.8])
    a = calibrate([[0.1, 0.5]], [[True, False]], thresholds)
    b = calibrate([[0.1, 0.5], [0.1, 0.5]], [[False, True], [False, True]], thresholds)
    both = worst_of([a, b])
    assert both.risk == (max(a.risk[0], b.risk[0]), max(a.risk[1], b.risk[1])) and both.episodes == 1


def test_a_nan_classifier_is_deliberative_and_the_threshold_decides():
    classifier = ActionTypeClassifier(ClassifierConfig(FeatureConfig(7, 4, state_lags=(1,))))
    history = ActionHistory(LIBERO, 4)
    history.observe(None)
    history.act(np.zeros(7, np.float32), Source.VLA)
    history.observe(None)
    decision = LearnedGate(classifier, 1.0, LIBERO).decide(history.window(), PROPOSALS)[0]
    assert decision.intuitive and 0 < decision.probability < 1
    assert not LearnedGate(classifier, -1.0, LIBERO).decide(history.window(), PROPOSALS)[0].intuitive
    with torch.no_grad():
        classifier.net[0].bias.fill_(float("nan"))
    assert not LearnedGate(classifier, 1.0, LIBERO).decide(history.window(), PROPOSALS)[0].intuitive


def test_a_state_that_no_training_saw_is_deliberative():
    features = FeatureConfig(7, 4, state_dims=(0, 2), state_q01=(-1, 0), state_q99=(1, 0.2), state_lags=(1,))
    gate = LearnedGate(ActionTypeClassifier(ClassifierConfig(features)), 1.0, LIBERO)

    def decide(*state):
        history = ActionHistory(LIBERO, 4)
        for _ in range(2):
            history.observe(np.array(state, np.float32))
            history.act(np.zeros(7, np.float32), Source.VLA)
        history.observe(np.array(state, np.float32))
        return gate.decide(history.window(), PROPOSALS)[0]

    assert decide(2, 1e6, 0.3).intuitive  # the second entry is not read
    for state in ((1000, 0, 0.1), (0, 0, -1000), (-11, 0, 0.1), (0, 0, 1.2)):
        decision = decide(*state)
        assert (decision.intuitive, decision.reason) == (False, "unfamiliar state")
