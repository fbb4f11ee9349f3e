"""Generators: the linear one against its closed forms and scikit-learn, the learned ones against their contracts."""

from dataclasses import fields
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from spvla.actions import LIBERO, ActionSpace
from spvla.errors import InputError
from spvla.generators import make_network
from spvla.generators.features import FeatureConfig, HistoryFeatures, feature_names, to_device
from spvla.generators.learned import GeneratorConfig
from spvla.generators.ridge import LastActionGenerator, RidgeGenerator, extrapolate, ridge_filter, validity_clip
from spvla.history import ActionHistory, Source, Window
from spvla.vlas.base import VLAOutput

XYZ = np.array(
    [(0.10, 0.50, 0), (0.14, 0.52, 0.01), (0.20, 0.55, 0.01), (0.24, 0.60, 0.02), (0.30, 0.62, 0.02), (0.35, 0.66, 0.03)],
    np.float32,
)
FEATURES = FeatureConfig(7, 12, (0, 1, 2), (-1, -1, -1), (1, 1, 1))


def filled(n: int, seed: int = 0, space: ActionSpace = LIBERO, length: int = 12) -> ActionHistory:
    g = np.random.default_rng(seed)
    history = ActionHistory(space, length)
    for i in range(n):
        history.observe(g.normal(size=5))
        action = g.uniform(-1, 1, space.dim).astype(np.float32)
        source = Source.VLA if i % 3 == 0 else Source.GENERATOR
        history.act(action, source, VLAOutput(action[None]) if source == Source.VLA else None)
    history.observe(g.normal(size=5))
    return history


def test_ridge_check_vector_and_filters():
    np.testing.assert_allclose(extrapolate(XYZ)[0], (0.398669, 0.690016, 0.034000), atol=2e-6)
    np.testing.assert_allclose(ridge_filter(6)[0], (-0.3333, -0.1333, 0.0667, 0.2667, 0.4667, 0.6667), atol=1e-4)
    np.testing.assert_allclose(ridge_filter(5)[0], (-0.4, -0.1, 0.2, 0.5, 0.8), atol=1e-4)
    np.testing.assert_allclose(ridge_filter(4)[0], (-0.5, 0, 0.5, 1), atol=1e-4)


@given(hnp.arrays(np.float32, (6, 3), elements=st.floats(-1, 1, width=32)))
def test_ridge_agrees_with_scikit_learn(y):
    from sklearn.linear_model import Ridge

    t = np.arange(6)
    model = Ridge(alpha=1e-4, fit_intercept=False).fit(np.stack([t, np.ones(6)], 1), y.astype(np.float64))
    np.testing.assert_allclose(extrapolate(y, horizon=2), model.predict([[6, 1], [7, 1]]), atol=1e-4)


@given(hnp.arrays(np.float32, (6, 3), elements=st.floats(-1, 1, width=32)))
def test_validity_clip_bounds_value_and_change(y):
    out = validity_clip(extrapolate(y), y)[0]
    step = np.abs(np.diff(y, axis=0)).max(0)
    assert (np.abs(out - y[-1]) <= step + 1e-6).all()
    assert (np.abs(out) <= np.maximum(0.9, np.abs(y[-1])) + 1e-6).all()  # beyond the limit only where the robot was already


def test_release_form_copies_rotation_and_gripper_paper_form_only_the_gripper():
    history = filled(8)
    last = history.last_action
    release = LIBERO.denormalize(RidgeGenerator(LIBERO).propose(history.window())[0, 0])
    paper = LIBERO.denormalize(RidgeGenerator(LIBERO, form="paper").propose(history.window())[0, 0])
    np.testing.assert_array_equal(release[3:], last[3:])
    np.testing.assert_allclose(paper[:6], extrapolate(history.recent(6))[0, :6], atol=1e-6)
    assert paper[6] == last[6] and not np.allclose(paper[3:6], last[3:6])


def test_release_form_needs_translation():
    joints = ActionSpace("arm", "joint_velocity", 10, (-1,) * 7, (1,) * 7, (-1,) * 7, (1,) * 7, gripper=(6,))
    with pytest.raises(InputError, match="translation"):
        RidgeGenerator(joints)
    RidgeGenerator(joints, form="paper").propose(filled(6, space=joints).window())


def test_a_batch_of_histories_gives_the_proposals_of_each():
    histories = [filled(steps) for steps in (0, 1, 2, 5, 9)]
    windows = [h.window() for h in histories]
    together = Window(*(np.concatenate([getattr(w, f.name) for w in windows]) for f in fields(Window)[:7]))
    torch.manual_seed(0)
    learned = make_network(vars(GeneratorConfig("mlp", FEATURES, gripper=(6,)))).bind(LIBERO)
    for generator in (RidgeGenerator(LIBERO), RidgeGenerator(LIBERO, "paper"), LastActionGenerator(LIBERO), learned):
        alone = np.concatenate([generator.propose(w) for w in windows])
        np.testing.assert_allclose(generator.propose(together), alone, atol=1e-5)


def test_every_change_of_a_history_reaches_the_network():
    """Features are computed once a step: never those of the step before."""
    torch.manual_seed(0)
    network = make_network(vars(GeneratorConfig("mlp", FEATURES))).eval()
    history = filled(20)
    changes = (
        lambda: history.observe(np.full(5, 0.3, np.float32)),
        lambda: history.act(np.full(7, 0.5, np.float32), Source.GENERATOR),
        lambda: history.amend(np.full(7, -0.5, np.float32)),
        lambda: history.act(np.full(7, 0.2, np.float32), Source.VLA),
    )
    seen = []
    with torch.inference_mode():
        for change in changes:
            change()
            seen.append(network(history.window()))
            torch.testing.assert_close(seen[-1], network(to_device(history.window(), "cpu")))  # tensors are never kept
    assert not any(torch.equal(a, b) for a, b in pairwise(seen))


@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_learned_generators(kind):
    torch.manual_seed(0)
    network = make_network(vars(GeneratorConfig(kind, FEATURES, gripper=(6,), horizon=3, width=32, depth=2))).eval()
    window = filled(20).window()
    proposal = network.bind(LIBERO).propose(window)
    assert proposal.shape == (1, 3, 7) and set(np.abs(proposal[0, :, 6])) == {1.0}
    with torch.inference_mode():  # arrays and tensors take different routes to the same features
        torch.testing.assert_close(network(window), network(to_device(window, "cpu")))


def test_transformer_blocks_are_causal():
    """A step's representation cannot change the ones before it."""
    torch.manual_seed(0)
    network = make_network(vars(GeneratorConfig("transformer", FEATURES, width=32, depth=2))).eval()
    block = network.blocks[0]
    x = torch.randn(1, 6, 32)
    y = x.clone()
    y[:, -1] += 1
    torch.testing.assert_close(block(x)[:, :-1], block(y)[:, :-1])


def test_features_are_exactly_what_the_design_allows():
    config = FeatureConfig(2, 3, (0, 4), (-1, 0), (1, 2), state_lags=(1, 2), vla_confidence=True, vla_features=2)
    assert feature_names(config) == [
        *("action[t-3][0]", "action[t-3][1]", "action[t-2][0]", "action[t-2][1]", "action[t-1][0]", "action[t-1][1]"),
        *("source[t-3]", "source[t-2]", "source[t-1]", "exists[t-3]", "exists[t-2]", "exists[t-1]"),
        *("state[t][0]", "state[t][4]"),
        *("state[t]-state[t-1][0]", "state[t]-state[t-1][4]", "state[t]-state[t-2][0]", "state[t]-state[t-2][4]"),
        *("vla_action[0]", "vla_action[1]", "vla_age", "state[t]-state[vla][0]", "state[t]-state[vla][4]"),
        *("vla_confidence[0]", "vla_confidence[1]", "vla_features[0]", "vla_features[1]"),
    ]
    assert HistoryFeatures(FEATURES)(filled(5).window()).shape == (1, len(feature_names(FEATURES)))


def test_a_generator_of_another_robot_is_refused():
    network = make_network(vars(GeneratorConfig("mlp", FeatureConfig(4, 12))))
    with pytest.raises(InputError, match="4 action dimensions"):
        network.bind(LIBERO)
    lacking = make_network(vars(GeneratorConfig("mlp", FeatureConfig(7, 12, vla_features=8)))).bind(LIBERO)
    with pytest.raises(InputError, match="vla_features"):
        lacking.propose(filled(3).window())
    lacking.propose(filled(0).window())  # before the first call nobody has anything to report


@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_what_the_vla_reports_of_itself_is_an_input(kind):
    config = FeatureConfig(7, 12, vla_confidence=True, vla_features=3)
    generator = make_network(vars(GeneratorConfig(kind, config, width=16, depth=1, heads=2))).bind(LIBERO)

    def proposal(features: list[float], confidence: float = 0.5) -> np.ndarray:
        history = ActionHistory(LIBERO, 12)
        history.observe(np.zeros(3))
        before = generator.propose(history.window())[0]
        sure, pooled = np.full(7, confidence, np.float32), np.array(features, np.float32)
        output = VLAOutput(np.zeros((1, 7), np.float32), confidence=sure, features=pooled)
        history.act(output.actions[0], Source.VLA, output)
        history.observe(np.zeros(3))
        return np.array([before[0], generator.propose(history.window())[0, 0]])

    first = proposal([0, 0, 0])
    for other in (proposal([0, 0, 1]), proposal([0, 0, 0], 0.9)):
        np.testing.assert_array_equal(first[0], other[0])
        assert not np.allclose(first[1], other[1])
    with pytest.raises(InputError, match="vla_features of 3 values, this VLA or data set has 2"):
        proposal([0, 0])
