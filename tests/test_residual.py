"""Generators in position spaces predict the change against the last executed action."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.windows import frames_of
from spvla import InputError, load_export, save_export
from spvla.actions import ActionSpace
from spvla.export import Export
from spvla.generators import make_baseline, make_network
from spvla.generators.features import FeatureConfig, to_device
from spvla.generators.learned import GeneratorConfig
from spvla.history import ActionHistory, Source
from spvla.store import Episode, RolloutWriter
from train.datamodules import RolloutData, fit_generator
from train.export import export_onnx

D, S, STEPS = 5, 3, 120
FEATURES = FeatureConfig(D, 6, state_dims=(0, 2), state_q01=(-1, -1), state_q99=(1, 1), state_lags=(1, 3))
RESIDUAL = (0.05, 0.0, 0.02, 0.3, 0.0)  # dimension 1 is predicted itself, dimension 4 is a binary gripper
KINDS = pytest.mark.parametrize("kind", ["mlp", "transformer"])


def arm(kind="joint_position", bound=1.2, **options):
    """Four joints and a gripper, whose scale and middle differ by dimension."""
    middle, half = np.array([0.3, -0.8, 0.0, 1.1, 0.5]), np.array([1.5, 0.4, 0.9, 2.0, 0.5])
    low, high = (tuple(middle + side * half) for side in (-1, 1))
    wide = (tuple(middle - bound * half), tuple(middle + bound * half))
    return ActionSpace("arm", kind, 30.0, low, high, *wide, gripper=(4,), **options)


def network(kind, residual=RESIDUAL, seed=0):
    torch.manual_seed(seed)
    made = make_network(vars(GeneratorConfig(kind, FEATURES, (4,), 3, 16, 2, 2, residual=residual))).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn_like(p) * 0.3)  # the last layer too, which starts at zero
    return made


def moved(space, steps, seed=0):
    g, history = np.random.default_rng(seed), ActionHistory(space, 6)
    for t in range(steps):
        history.observe(g.uniform(-1, 1, S))
        history.act(space.denormalize(g.uniform(-1, 1, D)), Source.GENERATOR if t % 3 == 2 else Source.VLA)
    history.observe(g.uniform(-1, 1, S))
    return history


def stacked(windows):
    """B windows of one as one window of B."""
    names = [k for k, v in vars(windows[0]).items() if v is not None]
    batch = {k: np.concatenate([getattr(w, k).copy() for w in windows]) for k in names}
    return replace(windows[0], **batch)


@KINDS
@settings(max_examples=20)
@given(seed=st.integers(0, 99), steps=st.integers(1, 12))
def test_an_output_of_zero_repeats_the_last_action(kind, seed, steps):
    space, made = arm(), network(kind, seed=seed)
    made.start_from_last_action(made.net.linear[-1] if kind == "mlp" else made.head)
    history = moved(space, steps, seed)
    proposed = made.bind(space).propose(history.window())[0]
    last = history.normalized[-1]
    for d in (0, 2, 3):
        assert (proposed[:, d] == last[d]).all()
    assert (proposed[:, 1] == 0).all() and (np.abs(proposed[:, 4]) == 1).all()


@KINDS
def test_a_new_generator_starts_as_the_last_action(kind):
    space = arm()
    fresh = make_network(vars(GeneratorConfig(kind, FEATURES, (4,), residual=RESIDUAL))).bind(space)
    history = moved(space, 7)
    np.testing.assert_array_equal(fresh.propose(history.window())[0, 0, [0, 2, 3]], history.normalized[-1, [0, 2, 3]])


@KINDS
@given(shift=st.floats(-0.5, 0.5))
@settings(max_examples=20)
def test_the_output_is_a_change_in_units_of_its_spread(kind, shift):
    """A bias of one on the last layer moves each dimension by its spread, whatever the last action is."""
    space, made = arm(bound=9.0), network(kind)
    made.start_from_last_action(made.net.linear[-1] if kind == "mlp" else made.head)
    layer = made.net.linear[-1] if kind == "mlp" else made.head
    with torch.no_grad():
        layer.bias.fill_(1.0)
    history = moved(space, 7)
    history.amend(space.denormalize(history.normalized[-1] + np.float32(shift)))
    change = made.bind(space).propose(history.window())[0, 0] - history.normalized[-1]
    np.testing.assert_allclose(change[[0, 2, 3]], [0.05, 0.02, 0.3], atol=1e-5)


@KINDS
def test_one_step_and_a_batch_give_the_same(kind):
    space, made = arm(), network(kind).bind(arm())
    histories = [moved(space, steps, steps) for steps in (0, 1, 2, 5, 6, 9, 20)]
    batch = stacked([h.window() for h in histories])
    together = made.propose(batch)
    for row, history in zip(together, histories, strict=True):
        np.testing.assert_allclose(made.propose(history.window())[0], row, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(made.network(batch), made.network(to_device(batch, "cpu")))


@pytest.mark.parametrize(("residual", "code"), [((0.1,) * 3, "wrong-length"), ((0.1,) * 5, "residual-gripper")])
def test_spreads_that_do_not_fit_are_refused(residual, code):
    with pytest.raises(InputError) as caught:
        GeneratorConfig("mlp", FEATURES, (4,), residual=residual)
    assert (caught.value.code, caught.value.field) == (code, "generator.residual")


@KINDS
def test_an_export_keeps_it(kind, tmp_path):
    space, made = arm(), network(kind)
    defaults = {"generator": kind, "gate": "learned", "risk": 0.1, "max_generated_run": 5}
    save_export(Export(space, 0.2, {kind: made}, {}, {}, defaults), tmp_path / "e")
    again = load_export(tmp_path / "e").generators[kind]
    window = stacked([moved(space, n, n).window() for n in (1, 4, 8)])
    assert again.config == made.config and again.config.residual == RESIDUAL
    with torch.inference_mode():
        torch.testing.assert_close(again(window), made(window), rtol=0, atol=0)


def trajectory(seed, space):
    """Absolute joint targets along a sum of slow sines; a gripper that closes half-way."""
    g, t = np.random.default_rng(seed), np.arange(STEPS)[:, None] / 30
    waves = [g.uniform(0.1, 0.5, 4) * np.sin(2 * np.pi * g.uniform(0.1, 0.5, 4) * t + g.uniform(0, 6, 4)) for _ in range(2)]
    normalized = np.concatenate([sum(waves), np.where(t > 2, 1.0, -1.0)], axis=1)
    states = np.concatenate([normalized[:, :2] + 0.01 * g.standard_normal((STEPS, 2)), t * 0], axis=1)
    return Episode(space.denormalize(normalized), "move", t[:, 0], states=states.astype(np.float32), success=True)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    def write(kind):
        folder = tmp_path_factory.mktemp("arm") / kind
        writer = RolloutWriter(folder, arm(kind), policy="operator")
        for seed in range(20):
            writer.write(f"job-{seed:03d}", [trajectory(seed, arm(kind))])
        return writer.finalize()

    return {kind: write(kind) for kind in ("joint_position", "joint_velocity")}


def test_the_data_decide_the_spread(stores):
    """Independently: the mean absolute step of the training episodes, read off the trajectories."""
    data = RolloutData([stores["joint_position"]], history=6, vla_output=False)
    firsts = {first // STEPS for first, _ in data.split.train}
    actions = np.stack([arm().normalize(trajectory(seed, arm()).actions) for seed in sorted(firsts)])
    expected = np.abs(np.diff(actions, axis=1)).mean((0, 1))
    np.testing.assert_allclose(data.residual[:4], expected[:4], rtol=1e-3)
    assert data.residual[4] == 0  # a binary gripper is classified
    assert RolloutData([stores["joint_velocity"]], history=6).residual == ()


@pytest.mark.slow
@KINDS
def test_learned_is_no_worse_than_the_last_action_in_a_position_space(stores, kind, tmp_path):
    data = RolloutData([stores["joint_position"]], history=6, batch_size=256)
    torch.manual_seed(0)
    made = fit_generator(data, data.split.train, {"kind": kind, "width": 32, "depth": 2, "heads": 2}, 150, kind)
    batch = data.windows.batch(frames_of(data.split.calibration))
    rows = batch.window.vla_age > 0

    def error(generator):
        return np.abs(generator.propose(batch.window)[rows, 0, :4] - batch.targets[rows, 0, :4]).max(1).mean()

    learned, last = error(made.bind(data.space)), error(make_baseline("last", data.space))
    assert last > 0.01 and learned < 0.8 * last
    defaults = {"generator": kind, "gate": "learned", "risk": 0.1, "max_generated_run": 5}
    export = Export(data.space, 0.2, {kind: made}, {}, {}, defaults)
    (tmp_path / "generators").mkdir()
    export_onnx(export, data.windows, frames_of(data.split.calibration), tmp_path)  # compares with torch
    assert (tmp_path / "generators" / f"{kind}.onnx").stat().st_size > 1000
