"""Generators and gates without torch, as a robot runs them, against the torch modules."""

import warnings
from dataclasses import fields, replace
from itertools import product

import numpy as np
import pytest
import torch

from spvla import load_export
from spvla.actions import LIBERO
from spvla.gates.classifier import ActionTypeClassifier, ClassifierConfig, LearnedGate, judge
from spvla.gates.eyes import EyesConfig
from spvla.generators import make_network
from spvla.generators.arrays import FEW_ROWS
from spvla.generators.features import FeatureConfig, to_device
from spvla.generators.learned import GeneratorConfig, MLPGenerator
from spvla.history import ActionHistory, Source, Window
from spvla.vlas.base import VLAOutput

RANGE = {"state_q01": (-1.0, -0.5, 0.0), "state_q99": (1.0, 0.5, 0.1)}
INPUTS = {
    "everything": {"state_dims": (0, 1, 4), **RANGE, "vla_confidence": True, "vla_features": 5},
    "no state": {},
    "no lags": {"state_dims": (4, 0, 2), **RANGE, "state_lags": ()},
    "no VLA": {"state_dims": (0, 1, 2), **RANGE, "vla_output": False},
    "plans": {"state_dims": (0, 1, 2), **RANGE, "vla_plan": 4},
}
RESIDUAL = {"targets": (), "changes": (0.1, 0.2, 0.05, 0.1, 0.1, 0.0, 0.0)}


def history(seed: int, steps: int, length: int = 8) -> ActionHistory:
    """Random motion before a camera that sees noise; every third step is the VLA's, with a plan of four actions and some
    proposal."""
    g = np.random.default_rng(seed)
    made = ActionHistory(LIBERO, length, plans=True, errors=True)
    for i in range(steps):
        made.observe(g.normal(0, 0.3, 5), g.integers(0, 256, (16, 16, 3), np.uint8))
        action = g.uniform(-1, 1, 7).astype(np.float32)
        asked = i % 3 == 0
        plan, features = g.uniform(-1, 1, (4, 7)).astype(np.float32), g.normal(size=5).astype(np.float32)
        output = VLAOutput(plan, confidence=g.uniform(0, 1, 7).astype(np.float32), features=features) if asked else None
        made.act(action, Source.VLA if asked else Source.GENERATOR, output, g.uniform(-1, 1, 7).astype(np.float32))
    made.observe(g.normal(0, 0.3, 5), g.integers(0, 256, (16, 16, 3), np.uint8))
    return made


def batch(rows: int) -> Window:
    """Windows of several histories, long and short ones, as one."""
    windows = [history(seed, steps).window() for seed, steps in zip(range(rows), (20, 7, 2, 13), strict=False)]
    plans = max(w.plan.shape[1] for w in windows)
    padded = [replace(w, plan=np.pad(w.plan, ((0, 0), (0, plans - w.plan.shape[1]), (0, 0)))) for w in windows]
    return Window(**{f.name: np.concatenate([getattr(w, f.name) for w in padded]) for f in fields(Window)})


def scrambled(module: torch.nn.Module) -> torch.nn.Module:
    """With weights that leave no output at zero."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    return module.eval()


@pytest.mark.parametrize(("kind", "inputs", "residual"), product(("mlp", "transformer"), INPUTS, RESIDUAL))
def test_every_generator_says_what_its_torch_module_says(kind, inputs, residual):
    config = {"gripper": (6,), "width": 16, "heads": 2, "residual": RESIDUAL[residual]}
    for depth, horizon, rows in product((0, 1, 3), (1, 4), (1, FEW_ROWS)):
        features = FeatureConfig(7, 8, **INPUTS[inputs])
        network = scrambled(make_network({"kind": kind, "features": features, "depth": depth, "horizon": horizon, **config}))
        window = batch(rows)
        bound = network.bind(LIBERO)
        reference = network.actions(to_device(window, "cpu")).detach().numpy()
        clipped = np.clip(reference, LIBERO.normalize(LIBERO.low), LIBERO.normalize(LIBERO.high))
        found = bound.propose(window)
        assert found.shape == (rows, horizon, 7) and found.dtype == np.float32
        np.testing.assert_allclose(found, clipped, atol=1e-5)
        np.testing.assert_allclose(replace(bound, without_torch=False).propose(window), clipped, atol=1e-5)
        assert np.abs(reference).std() > 0.01


@pytest.mark.parametrize(("inputs", "eyes", "error"), product(INPUTS, (None, EyesConfig(size=16, width=4)), (False, True)))
def test_every_gate_says_what_its_torch_module_says(inputs, eyes, error):
    for depth, rows in product((0, 1, 3), (1, FEW_ROWS)):
        features = FeatureConfig(7, 8, **INPUTS[inputs])
        config = ClassifierConfig(features, width=16, depth=depth, eyes=eyes, last_disagreement=error)
        gate = scrambled(ActionTypeClassifier(config))
        window, g = batch(rows), np.random.default_rng(1)
        proposals = g.uniform(-1, 1, (rows, 7)).astype(np.float32)
        reference = gate.probability(to_device(window, "cpu"), torch.from_numpy(proposals)).detach().numpy()
        np.testing.assert_allclose(gate.estimate(window, proposals), reference, atol=1e-5)
        limits = LIBERO.with_max_jump(np.full(7, 1.1))
        found, expected = judge(gate, limits, window, proposals), judge(gate, limits, window, proposals, without_torch=False)
        for name in ("familiar", "admissible", "started", "kept"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        np.testing.assert_allclose(found.actions, expected.actions, atol=1e-5)
        alone = [judge(gate, limits, one_of(window, i), proposals[i : i + 1]) for i in range(rows)]
        np.testing.assert_array_equal(found.admissible, [v.admissible[0] for v in alone])  # one row is compared in another way
        np.testing.assert_array_equal(found.familiar, gate.features.familiar(window.states[:, -1]))


def one_of(window: Window, row: int) -> Window:
    return Window(**{f.name: getattr(window, f.name)[row : row + 1] for f in fields(Window)})


@pytest.mark.parametrize("name", ["generator_libero_expert", "generator_nano", "generator_libero_real_time"])
def test_the_packaged_exports_decide_the_same_through_torch(name):
    export = load_export(name)
    for generator, classifier in export.gates.items():
        part = export.generator(generator, LIBERO)
        reference = replace(part, without_torch=False) if generator in export.generators else part
        gate = LearnedGate(classifier, 0.5, export.limits(generator, LIBERO))
        features, g = classifier.config.features, np.random.default_rng(0)
        made = ActionHistory(LIBERO, max(part.history_length, gate.history_length))
        seen = 0
        for step in range(60):
            made.observe(g.normal(0, 0.1, 8))
            window = made.window()
            proposals = part.propose(window)
            np.testing.assert_allclose(proposals, reference.propose(window), atol=1e-5)
            decision = gate.decide(window, proposals[:, 0])[0]
            other = replace(gate, without_torch=False).decide(window, proposals[:, 0])[0]
            assert decision.probability == pytest.approx(other.probability, abs=1e-5)
            same = abs(decision.probability - gate.threshold) > 1e-5
            assert not same or (decision.intuitive, decision.refused) == (other.intuitive, other.refused)
            assert decision.reason == other.reason
            seen += same
            output = VLAOutput(proposals[0, :1], features=g.normal(size=features.vla_features).astype(np.float32))
            made.act(g.uniform(-0.5, 0.5, 7), Source(step % 2), output if step % 2 == 0 else None)
        assert seen > 50


def test_what_is_not_finite_stays_so_and_warns_nobody():
    network = scrambled(make_network({"kind": "mlp", "features": FeatureConfig(7, 8, vla_features=5), "width": 16}))
    gate = scrambled(ActionTypeClassifier(ClassifierConfig(FeatureConfig(7, 8, vla_features=5), width=16)))
    for bad in (np.nan, np.inf):
        window = replace(history(0, 20).window(), vla_features=np.full((1, 5), bad, np.float32))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            proposals = network.bind(LIBERO).propose(window)[:, 0]
            verdicts = judge(gate, LIBERO, window, proposals)
        assert np.isnan(proposals).all() and not verdicts.generated(1.0)[0]


def test_the_arrays_are_the_modules_own_weights():
    """A network that is trained on after it was bound says what it says now."""
    for kind in ("mlp", "transformer"):
        network = scrambled(make_network({"kind": kind, "features": FeatureConfig(7, 8), "width": 16, "heads": 2}))
        bound, window = network.bind(LIBERO), history(0, 20).window()
        before = bound.propose(window)
        scrambled(network)
        assert np.abs(bound.propose(window) - before).max() > 1e-3
        np.testing.assert_allclose(bound.propose(window), replace(bound, without_torch=False).propose(window), atol=1e-5)


class Doubled(MLPGenerator):
    """A kind of one's own, built on a built-in one; it says nothing of arrays."""

    def outputs(self, window, changes):
        return 2 * super().outputs(window, changes)


def test_a_network_of_ones_own_goes_through_torch():
    config = GeneratorConfig("mlp", FeatureConfig(7, 8), width=16, horizon=1)
    own, plain = Doubled(config), MLPGenerator(config)
    own.load_state_dict(scrambled(plain).state_dict())
    with torch.no_grad():
        plain.net.linear[-1].weight *= 2
        plain.net.linear[-1].bias *= 2
    window = history(0, 20).window()
    np.testing.assert_allclose(own.bind(LIBERO).propose(window), plain.bind(LIBERO).propose(window), atol=1e-5)
