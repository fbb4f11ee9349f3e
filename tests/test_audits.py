"""Labels by coin: what a robot records under a live gate, and that calibrating on it is unbiased and keeps its promise."""

from itertools import product

import numpy as np
import pytest

from data.collect import collect
from data.sources import open_source
from data.store import RolloutStore
from data.words import Words, split_at_words
from spvla import InputError, Observation, SPVLAPolicy
from spvla.actions import LIBERO
from spvla.gates.audited import audited_risk, largest_cap, largest_loss
from spvla.gates.calibration import calibrate
from spvla.gates.classifier import ActionTypeClassifier, ClassifierConfig
from spvla.generators.ridge import LastActionGenerator
from spvla.history import Source
from spvla.recording import Recorder
from spvla.store import RolloutWriter, read_episodes
from spvla.store.columns import read_propensities
from spvla.vlas.base import VLAUnavailable
from tests.conftest import ScriptedVLA, smooth_episode
from tests.test_live import A, live
from tests.test_policy import Fixed
from train.calibrate import calibration_curve
from train.datamodules import RolloutData

# ---------------------------------------------------------------------------------------------------------- recording


def record(folder, gate, vla=None, steps=80, **options):
    """The steps of an episode under ``gate``, recorded."""
    policy = Recorder(SPVLAPolicy(vla or ScriptedVLA(np.tile(A, (steps, 1)) + 0.1), Fixed(A), gate, **options), folder)
    policy.reset("do it")
    for _ in range(steps):
        policy.select_action(Observation(state=np.zeros(8)))
    taken = list(policy.steps)
    policy.close()
    return taken


@pytest.mark.parametrize("executed", [True, False])
def test_a_recording_says_how_probable_each_label_was(tmp_path, executed):
    gate = live(0.7, scores=(0.2, 0.2, 0.9), audit=0.25, step=1e-6, executed=executed, agreement=False)
    steps = record(tmp_path / "store", gate)
    (episode,) = read_episodes(tmp_path / "store")
    labelled = np.isfinite(episode.vla_actions).all(1)
    audited = np.array([s.reason == "audit" for s in steps])
    mayact = audited | (episode.sources == Source.GENERATOR)
    np.testing.assert_array_equal(episode.vla_propensities, np.where(mayact, np.float32(0.25), 1))
    assert labelled[audited].all() and labelled[~mayact].all() and not labelled[mayact & ~audited].any()
    assert (episode.sources[audited] == (Source.VLA if executed else Source.GENERATOR)).all() and 4 < audited.sum() < 30
    store = RolloutStore(tmp_path / "store")
    np.testing.assert_array_equal(store.propensities(slice(0, 80)), episode.vla_propensities)
    (part,) = (source := open_source("lerobot", tmp_path / "store")).parts
    (again,) = source.episodes(part)
    np.testing.assert_array_equal(again.vla_propensities, episode.vla_propensities)
    pieces = split_at_words(episode, Words(["a", "b"], np.repeat([0, 1], 40)))
    np.testing.assert_array_equal(np.concatenate([p.vla_propensities for p in pieces]), episode.vla_propensities)


def test_other_gates_record_no_propensities(tmp_path):
    record(tmp_path / "store", live().gate)
    (episode,) = read_episodes(tmp_path / "store")
    assert episode.vla_propensities is None and RolloutStore(tmp_path / "store").propensities(slice(0, 80)) is None


def test_a_label_that_the_vla_failed_to_give_is_not_missing_by_chance(tmp_path):
    class Failing(ScriptedVLA):
        def predict(self, observation, keep_mass=1.0):
            if self.calls % 3 == 2:
                self.calls += 1
                raise VLAUnavailable("gone")
            return super().predict(observation)

    gate = live(audit=0.5, step=1e-6, agreement=False)
    steps = record(tmp_path / "store", gate, Failing(np.tile(A, (80, 1))), when_unavailable="generator")
    failed = np.array([s.unavailable is not None for s in steps])
    assert failed.any() and all(s.propensity == 1 for s in steps if s.unavailable)
    store = RolloutStore(tmp_path / "store")
    assert (store.arrays["sources"][failed] == Source.GENERATOR).any()
    assert store.propensities(slice(0, 80)) is None and store.unlabelled()


def test_a_proposal_that_is_refused_anyway_is_not_the_coins_matter():
    policy = SPVLAPolicy(ScriptedVLA(np.zeros((50, 7))), Fixed(np.full(7, 0.9)), live(audit=0.5, agreement=False))
    policy.space = LIBERO.with_max_jump(np.full(7, 0.1))
    policy.reset("do it")
    for _ in range(50):
        policy.select_action(Observation(state=np.zeros(8)))
    assert any(s.reason == "audit" for s in policy.steps) and {s.propensity for s in policy.steps} == {1.0}


@pytest.mark.parametrize("bad", [0.0, -0.1, 1.5, np.nan, np.inf])
def test_what_is_no_probability_is_refused(tmp_path, bad):
    episode = smooth_episode(0)
    episode.vla_propensities = np.ones(60, np.float32)
    episode.vla_propensities[3] = bad
    with pytest.raises(InputError, match="at step 3") as caught:
        RolloutWriter(tmp_path, LIBERO).write("job", [episode])
    assert (caught.value.code, caught.value.field) == ("damaged", "vla_propensity")
    import pyarrow as pa

    for read in (
        lambda: read_propensities(pa.table({"vla_propensity": pa.array([1, bad], pa.float32())}), "file"),
        lambda: calibrate([[0.5]], [[True]], propensities=[[bad]]),
    ):
        with pytest.raises(InputError) as caught:
            read()
        assert (caught.value.code, caught.value.field) == ("damaged", "vla_propensity")


# ---------------------------------------------------------------------------------------------------------- the bound


def coins(propensities):
    """All outcomes of the coins and their probabilities."""
    for thrown in product([False, True], repeat=len(propensities)):
        yield np.array(thrown), float(np.prod(np.where(thrown, propensities, 1 - propensities)))


def test_over_all_coins_the_estimate_is_the_loss_and_the_capped_one_is_never_below():
    g = np.random.default_rng(0)
    p, bad, thresholds = g.random(7), g.random(7) < 0.6, np.linspace(0, 1, 11)
    q = np.where(g.random(7) < 0.3, 1.0, 0.3)
    loss = np.array([((p <= t) & bad).mean() for t in thresholds])
    bound, plain, capped = largest_loss(1, 0.3), np.zeros(11), np.zeros(11)
    for thrown, chance in coins(q):
        seen = bad & thrown
        plain += chance * np.array([((p <= t) & seen) @ (1 / q) / 7 for t in thresholds])
        risk, _ = audited_risk([p], [seen], [q], thresholds)
        assert (np.diff(risk) >= 0).all() and risk[-1] <= bound
        capped += chance * (2 * risk - bound)  # without the one episode to come
    np.testing.assert_allclose(plain, loss)
    assert (capped >= loss - 1e-12).all() and (capped <= loss + 0.7).all()


@pytest.mark.parametrize("bound", [1.2, 1.7, 2.5])
def test_the_cap_by_brute_force(bound):
    cap = largest_cap(9, 0.3, bound)
    excess = sum(chance * max(0.0, thrown.sum() / 2.7 - cap) for thrown, chance in coins(np.full(9, 0.3)))
    assert cap + excess == pytest.approx(bound)
    assert largest_cap(9, 0.3, 1 / 0.3) == pytest.approx(1 / 0.3) and largest_cap(9, 1.0, 1.0) == 1


def test_an_executed_audits_label_weighs_one_over_its_probability():
    steps, bad = np.full(200, 0.5), np.zeros(200, bool)
    bad[7] = True
    rare = np.ones(200)
    rare[[7, 50]] = 0.25
    n = 40

    def risk(deviates, chance):
        return calibrate([steps] * n, [deviates] * n, propensities=[chance] * n).risk[0]

    nothing = risk(np.zeros(200, bool), rare)
    assert risk(bad, rare) - nothing == pytest.approx(n / (n + 1) * 4 / 200)
    assert risk(np.roll(bad, 1), rare) - nothing == pytest.approx(n / (n + 1) * 1 / 200)


def test_certain_coins_are_the_old_curve():
    g = np.random.default_rng(1)
    p = [g.random(30) for _ in range(25)]
    bad = [g.random(30) < x for x in p]
    old, new = calibrate(p, bad), calibrate(p, bad, propensities=[np.ones(30)] * 25)
    np.testing.assert_allclose(new.risk, old.risk)
    assert (new.coverage, new.deviating, new.episodes) == (old.coverage, old.deviating, old.episodes)


@pytest.mark.slow
@pytest.mark.parametrize("risk", [0.1, 0.2])
def test_the_true_risk_of_new_episodes_stays_below_the_allowed_one(risk):
    g = np.random.default_rng(2)

    def draw(n):
        p = g.random((n, 30))
        return p, g.random((n, 30)) < p * g.random((n, 1))

    losses = []
    for _ in range(200):
        p, bad = draw(40)
        seen = bad & (g.random(bad.shape) < 0.2)
        threshold = calibrate(list(p), list(seen), propensities=[np.full(30, 0.2)] * 40).threshold(risk)
        p, bad = draw(200)
        losses.append(((p <= threshold) & bad).mean())
    assert np.mean(losses) <= risk + 3 * np.std(losses) / np.sqrt(len(losses))
    assert np.mean(losses) > 0.3 * risk  # and it is not an empty promise


# --------------------------------------------------------------------------------------------------------- calibration


def robot(folder, audit, propensities=True, seeds=range(20, 30), rounds=3):
    """Synthetic episodes of the calibration states, labelled by coin where the generator acts."""
    writer, g = RolloutWriter(folder, LIBERO, policy="synthetic"), np.random.default_rng(5)
    for k in range(rounds):
        for seed in seeds:
            episode = smooth_episode(seed)
            generated = episode.sources == Source.GENERATOR
            episode.vla_actions[generated & (g.random(60) > audit)] = np.nan
            if propensities:
                episode.vla_propensities = np.where(generated, np.float32(audit), np.float32(1))
            writer.write(f"job-{k}-{seed}", [episode])
    return writer.finalize()


def curve(store_folder, folder):
    data = RolloutData([store_folder], history=8, calibration_data=[folder])
    only = [span for span in data.split.calibration if span[0] >= data.windows.offsets[1]]
    data.split = type(data.split)(data.split.train, only, data.split.by)
    gate = ActionTypeClassifier(ClassifierConfig(data.features, width=16, depth=1)).eval()
    return calibration_curve(data, LastActionGenerator(LIBERO), gate, 0.2, LIBERO)


def test_episodes_labelled_by_coin_calibrate(store_folder, tmp_path):
    import torch

    def with_seed(folder):
        torch.manual_seed(0)
        return curve(store_folder, folder)

    full = with_seed(robot(tmp_path / "full", 1.0, propensities=False))
    coin = with_seed(robot(tmp_path / "coin", 0.5))
    assert coin.thresholds == full.thresholds
    np.testing.assert_allclose(coin.coverage, full.coverage)  # the gate speaks at every step, labelled or not
    np.testing.assert_allclose(coin.deviating[-100:], full.deviating[-100:], rtol=0.2)
    assert coin.risk[-1] > full.risk[-1] and coin.episodes < full.episodes == 30
    with pytest.raises(InputError, match="30 of 30 calibration episodes"):
        with_seed(robot(tmp_path / "none", 0.5, propensities=False))


# -------------------------------------------------------------------------------------------------------- the simulator


@pytest.mark.parametrize(("options", "field"), [({}, "label"), ({"export": "e", "noise": 0.1}, "noise")])
def test_only_an_accelerated_policy_goes_without_labels(tmp_path, options, field):
    with pytest.raises(InputError) as caught:
        collect("libero_object", tmp_path / "store", label=False, **options)
    assert caught.value.field == field


@pytest.mark.slow
def test_a_collection_without_labels_is_one_deployment_that_goes_on_after_a_stop(tmp_path):
    """What a robot would know: the VLA's actions where it was asked, and the probability that it was."""

    def robot_like(folder, init_states, workers):
        options = {"export": "generator_libero_expert", "gate": "live", "risk": 0.1, "label": False}
        collect("libero_object", folder, tasks=[0], init_states=init_states, max_steps=60, workers=workers, **options)
        (learned,) = (folder / ".live").glob("*.json")
        return list(read_episodes(folder)), learned.read_text()

    whole, learned = robot_like(tmp_path / "whole", "0-1", 2)
    robot_like(tmp_path / "parts", "0", 1)
    parts, again = robot_like(tmp_path / "parts", "0-1", 1)
    assert again == learned and len(whole) == len(parts) == 2
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(a.actions, b.actions)
        np.testing.assert_array_equal(a.vla_propensities, b.vla_propensities)
        labelled, coin = np.isfinite(a.vla_actions).all(1), a.vla_propensities < 1
        assert labelled[~coin].all() and (a.sources[~labelled] == Source.GENERATOR).all() and coin.any()
    assert any((np.isfinite(e.vla_actions).all(1) & (e.vla_propensities < 1)).any() for e in whole)
