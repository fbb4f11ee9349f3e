"""A gate that knows how far off its generator was when the VLA was last asked: online, in training and in calibration."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import spvla
import train.stages
from data.disagreement import frame_errors, propose
from data.store import RolloutStore
from data.windows import Windows, frames_of
from eval.offline import judge_store
from spvla.actions import LIBERO
from spvla.errors import InputError
from spvla.explanation import explain
from spvla.export import load_export
from spvla.gates.base import Decisions
from spvla.gates.classifier import ActionTypeClassifier, ClassifierConfig, input_names
from spvla.gates.live import LiveGate, LiveOptions
from spvla.generators.features import FeatureConfig, feature_names
from spvla.generators.ridge import LastActionGenerator
from spvla.history import ActionHistory, Source
from spvla.info import print_info
from spvla.observation import Observation
from spvla.policy import SPVLAPolicy
from spvla.realtime import BridgePolicy, SimulatedCalls
from spvla.recording import Recorder
from spvla.shadow import ShadowPolicy
from spvla.store import Episode, RolloutWriter, read_episodes
from spvla.vlas.base import VLAOutput
from tests.conftest import ScriptedVLA
from train.calibrate import judge_episode
from train.datamodules import GateData, RolloutData, fold_of_frames, quick_fit
from train.distill import distill
from train.export import export_onnx
from train.modules import ClassifierModule
from train.stages import Plan

SMALL = {"width": 16, "depth": 1}


class Coin:
    """A gate that lets the generator act at random, or keeps the VLA's plan; it remembers what it saw."""

    history_length, reads_error = 2, True

    def __init__(self, reads_plan=False):
        self.rng, self.reads_plan, self.errors = np.random.default_rng(0), reads_plan, []

    def decide(self, window, proposals):
        self.errors.append(window.vla_error[0].copy())
        kept = None if not self.reads_plan else np.array([self.rng.random() < 0.5])
        return Decisions(np.array([self.rng.random() < 0.7]), np.array(["coin"]), np.array([0.1]), threshold=0.5, kept=kept)


def made(mode, gate, vla):
    generator, options = LastActionGenerator(LIBERO), {"max_generated_run": 7}
    if mode == "bridge":
        return BridgePolicy(vla, generator, gate, calls=SimulatedCalls(vla, 3), **options)
    if mode == "live":
        gate = LiveGate(gate, (0.05, 0.5), 0.9, 0.5, LIBERO, 0.2, LiveOptions(audit=0.3, pause=0, agreement=False))
    return (ShadowPolicy if mode == "shadow" else SPVLAPolicy)(vla, generator, gate, **options)


def recorded(policy, folder, states):
    """A policy's steps at ``states`` (T, S)."""
    policy = Recorder(policy, folder)
    policy.reset("go")
    for state in states:
        policy.tick(lambda state=state: Observation(None, state), state)
    policy.finish(success=True)
    policy.close()
    return policy


def judged(windows, generator):
    spans = [(first, info.length) for _, first, info in windows.episodes]
    return windows.knowing(frame_errors(windows, [generator], spans))


@pytest.mark.parametrize(
    ("mode", "chunk", "plans"),
    [("wait", 1, False), ("wait", 3, False), ("wait", 3, True), ("shadow", 1, False), ("live", 1, False), ("bridge", 1, False)],
)
def test_what_training_reads_from_a_recording_is_what_the_policy_knew(mode, chunk, plans, tmp_path):
    """Against the definition, worked out from the recording: the action before the VLA's last call less its answer there."""
    gate = Coin(reads_plan=plans)
    vla = ScriptedVLA(np.random.default_rng(3).uniform(-0.6, 0.6, (200, 7)), chunk=chunk)
    states = np.random.default_rng(5).normal(size=(70, 3)).astype(np.float32)
    policy = recorded(made(mode, gate, vla), tmp_path / "store", states)
    store = RolloutStore(tmp_path / "store")
    windows = judged(Windows([store], 2, plans=plans), LastActionGenerator(store.space))
    decided = np.array([i for i, s in enumerate(policy.steps) if s.probability is not None])
    assert len(decided) == len(gate.errors) > 15
    read = windows.batch(decided).window
    (episode,) = read_episodes(tmp_path / "store")
    call = decided - read.vla_age.astype(int)
    answers = LIBERO.normalize(episode.vla_actions[call])
    expected = np.where(call[:, None] > 0, LIBERO.normalize(episode.actions[call - 1]) - answers, 0)
    assert (call > 0).sum() > 10 and np.isfinite(expected).all()
    np.testing.assert_allclose(gate.errors, expected, atol=1e-6)
    np.testing.assert_allclose(read.vla_error, expected, atol=1e-6)


def test_proposals_that_mean_nothing_are_no_error():
    history = ActionHistory(LIBERO, 2, errors=True)
    assert ActionHistory(LIBERO, 2).errors is False
    for proposed in (None, np.full(7, np.nan, np.float32), np.full(7, np.inf, np.float32)):
        history.observe(np.zeros(2))
        history.act(np.full(7, 0.5, np.float32), Source.VLA, VLAOutput(np.full((1, 7), 0.5, np.float32)), proposed)
        history.observe(np.zeros(2))
        np.testing.assert_array_equal(history.window().vla_error, np.zeros((1, 7)))
    answer = VLAOutput(np.full((1, 7), 0.25, np.float32))
    history.answer(answer, np.zeros(2, np.float32), 4, np.full(7, 1, np.float32))
    expected = 1 - LIBERO.normalize(answer.actions)
    np.testing.assert_allclose(history.window().vla_error, expected)
    history.act(np.zeros(7, np.float32), Source.GENERATOR, None, np.zeros(7, np.float32))
    history.observe(np.zeros(2))
    np.testing.assert_allclose(history.window().vla_error, expected)
    history.reset()
    history.observe(np.zeros(2))
    assert not history.window().vla_error.any()


def test_an_older_call_is_pretended_with_the_error_that_was_made_there(store_folder):
    windows = judged(Windows([RolloutStore(store_folder)] * 2, 6), LastActionGenerator(LIBERO))
    g = np.random.default_rng(0)
    frames = g.integers(0, len(windows), 300)
    batch = windows.batch(frames, g.integers(0, 6, 300), np.where(g.random(300) < 0.5, g.integers(1, 9, 300), 0))
    age = batch.window.vla_age.astype(int)
    assert len(set(age.tolist())) > 6
    at_call = windows.batch(frames - age)
    off = at_call.window.actions[:, -1] - at_call.targets[:, 0]
    expected = np.where((age > 0)[:, None] & (at_call.window.vla_age > 0)[:, None], off, 0)
    np.testing.assert_allclose(batch.window.vla_error, expected, atol=1e-6)
    assert (np.abs(expected).max(1) > 0.1).sum() > 200


class Constant:
    history_length = 1

    def __init__(self, value):
        self.value = value

    def propose(self, window):
        return np.full((len(window.actions), 1, 7), self.value, np.float32)


def test_the_error_in_an_episode_is_that_of_the_judge_of_its_fold(store_folder):
    data = RolloutData([store_folder], history=8, last_disagreement=True)
    fold = fold_of_frames(data.split, 2, len(data.windows))
    windows = data.judged([Constant(0.0), Constant(0.9), Constant(0.3)], data.split.train, fold)
    frames = frames_of(data.split.train)
    batch = data.windows.batch(frames)
    known = batch.window.vla_age > 0
    value = np.where(fold[frames] == 1, np.float32(0.9), 0)[:, None]
    np.testing.assert_allclose(windows.errors[frames[known]], (value - batch.targets[:, 0])[known], atol=1e-6)
    assert not windows.errors[frames[~known]].any() and not windows.errors[frames_of(data.split.calibration)].any()
    assert RolloutData([store_folder], history=8).judged([Constant(0.0)], data.split.train).errors is None
    gate = GateData([store_folder], "last", history=8, last_disagreement=True)
    np.testing.assert_allclose(gate.seen.errors, frame_errors(gate.windows, gate.judges, [(0, len(gate.windows))]), atol=1e-6)


def distilled(store, folder, gate, **options):
    parts = {"mlp": SMALL, "gate": {**SMALL, **gate}, "baselines": ["ridge"], "history": 6, "batch_size": 256, "threads": 1}
    distill([store], folder, **{**parts, "steps": 30, "gate_steps": 30, **options})
    return folder


@pytest.fixture(scope="module")
def export_folder(store_folder, tmp_path_factory):
    return distilled(store_folder, tmp_path_factory.mktemp("disagreement") / "export", {"last_disagreement": True})


def test_distillation_takes_errors_of_generators_that_have_not_seen_the_episode(store_folder, tmp_path, monkeypatch):
    caught = {}

    def looked_at(module, stream, description, position=0):
        caught[description] = module, stream

    monkeypatch.setattr(train.stages, "quick_fit", looked_at)
    distilled(store_folder, tmp_path / "export", {"last_disagreement": True}, steps=5)
    module, stream = caught["gate of mlp"]
    frames = frames_of(stream.groups[0])[::7]
    batch = stream.windows.batch(frames)
    rows = batch.window.vla_age > 0
    by_fold = [propose(module.judges, np.full(len(frames), k, np.uint8), batch.window) for k in (0, 1, 2)]
    assert all(np.abs(a - b).max() > 1e-3 for a, b in ((by_fold[0], by_fold[1]), (by_fold[0], by_fold[2])))
    proposals = np.where(module.fold[frames, None] == 0, by_fold[0], by_fold[1])
    np.testing.assert_allclose(stream.windows.errors[frames[rows]], (proposals - batch.targets[:, 0])[rows], atol=1e-5)
    assert set(module.fold[frames].tolist()) == {0, 1} and caught["gate of ridge"][1].windows.errors.any()


def hidden_mood(seed, steps=40):
    """The generator is right in the whole episode or wrong in the whole of it; only the state says so, which the gate does not
    read."""
    g = np.random.default_rng(seed)
    labels = np.zeros((steps, 7), np.float32)
    labels[:, 0], labels[:, 6] = g.choice([-0.4, 0.4], steps), -1
    mood = np.full(steps, g.choice([-1, 1]))
    states = np.stack([g.normal(size=steps), LIBERO.normalize(labels)[:, 0], mood], 1).astype(np.float32)
    sources = np.zeros(steps, np.uint8)
    facts = {"dataset": "moods", "number": seed}
    times = np.arange(steps) / 20
    return Episode(labels, "go", times, states=states, sources=sources, vla_actions=labels.copy(), metadata=facts)


class Moody:
    space, history_length = LIBERO, 1

    def propose(self, window):
        out = np.zeros((len(window.states), 1, 7), np.float32)
        out[:, 0, 0], out[:, 0, 6] = window.states[:, -1, 1] * window.states[:, -1, 2], -1
        return out


def test_a_gate_learns_from_the_error_and_decides_by_it(tmp_path):
    writer = RolloutWriter(tmp_path / "store", LIBERO, policy="moody")
    writer.write("all", [hidden_mood(seed) for seed in range(40)])
    generator, found = Moody(), {}
    for reads in (False, True):
        torch.manual_seed(0)
        data = RolloutData([writer.finalize()], 6, [0], batch_size=256, last_disagreement=reads, hide=0.5)
        fold = np.zeros(len(data.windows), np.uint8)
        module = ClassifierModule(data.features, [generator], fold, data.space, 32, 2, 0.0, last_disagreement=reads)
        spans = data.split.calibration
        quick_fit(
            module, data.stream(data.split.train, batches=150, windows=data.judged([generator], data.split.train)), "gate"
        )
        gate, windows = module.network.eval(), data.judged([generator], spans)
        batch = windows.batch(frames_of(spans))
        window, rows = batch.window, np.arange(len(batch.valid)) % 40 > 1  # at the first call there is no error yet
        proposals = generator.propose(window)[:, 0]
        p = gate.estimate(window, proposals)[rows]
        wrong = LIBERO.deviation(proposals, batch.targets[:, 0], 0.2)[rows]
        found[reads] = p[wrong].mean() - p[~wrong].mean()
        if reads:
            turned = replace(window, vla_error=np.where(np.abs(window.vla_error) > 0.4, 0, window.vla_error))
            assert (gate.estimate(turned, proposals)[rows][wrong] < 0.5).all() and (p[wrong] > 0.5).all()
            with pytest.raises(InputError) as caught:
                gate.estimate(replace(window, vla_error=None), proposals)
            assert (caught.value.code, caught.value.field) == ("no-disagreement", "vla_error")
    assert found[True] > 0.9 and found[False] < 0.2


def test_an_export_keeps_it_and_old_ones_go_without(export_folder, tmp_path, capsys):
    export = load_export(export_folder)
    assert export.reads_error and all(gate.config.last_disagreement for gate in export.gates.values())
    again = load_export(spvla.save_export(export, tmp_path / "again"))
    assert again.gates["mlp"].config == export.gates["mlp"].config
    print_info(str(export_folder))
    assert "read the generator's error at the VLA's last call" in capsys.readouterr().out
    assert "the generator's error at the VLA's last call" in (export_folder / "README.md").read_text()
    assert not load_export("generator_libero_expert").reads_error


MODES = {"wait": {}, "shadow": {"shadow": True}, "live": {"gate": "live"}, "bridge": {"mode": "bridge"}, "ridge": {}}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_decides_with_it(mode, export_folder, store_folder):
    """Each decision, against the classifier told by hand what the generator was off by."""
    export = load_export(export_folder)
    episode = next(read_episodes(store_folder))
    vla = ScriptedVLA(episode.vla_actions)
    generator = "ridge" if mode == "ridge" else "mlp"
    policy = spvla.accelerate(vla, export, risk=0.5, generator=generator, max_generated_run=4, **MODES[mode])
    if mode == "bridge":
        policy.calls = SimulatedCalls(policy.ledger.counted(vla), 2)
    gate, windows = policy.gate, []
    inner = getattr(gate, "gate", gate).classifier
    told = inner.estimate

    def noted(window, proposals, without_torch=True):
        windows.append((window.vla_error.copy(), told(replace(window, vla_error=0 * window.vla_error), proposals)[0]))
        return told(window, proposals, without_torch)

    inner.estimate = noted
    policy.reset("go")
    for state in episode.states:
        policy.tick(lambda state=state: Observation(None, state), state)
    decided = [s for s in policy.steps if s.probability is not None]
    assert len(decided) == len(windows) > 20
    changed = [abs(s.probability - blind) > 1e-9 for s, (_, blind) in zip(decided, windows, strict=True)]
    assert changed == [bool(error.any()) for error, _ in windows] and sum(changed) > 15
    assert "reads the generator's error at the VLA's last call" in explain(policy)["gate"].why


def test_calibration_and_evaluation_decide_as_the_robot_does(export_folder, store_folder, tmp_path):
    export = load_export(export_folder)
    episode = next(read_episodes(store_folder))
    policy = spvla.accelerate(ScriptedVLA(episode.vla_actions), export, 0.5, generator="mlp", shadow=True)
    policy = recorded(policy, tmp_path / "store", episode.states)
    online = np.array([np.nan if s.probability is None else s.probability for s in policy.steps])
    asked = np.isfinite(online)
    assert asked.sum() > 20
    windows = Windows([RolloutStore(tmp_path / "store")], 6, space=export.space)
    offline = judge_store(windows, export, ["mlp", "ridge"]).verdicts["mlp"].probability
    np.testing.assert_allclose(offline[asked[1:]], online[asked], atol=1e-5)
    generator, told = export.generator("mlp", LIBERO), judged(windows, export.generator("mlp", LIBERO))
    lowest, _ = judge_episode(told, generator, export.gates["mlp"], 0, len(episode), 0.2, LIBERO)
    rows = asked & np.isfinite(lowest)
    np.testing.assert_allclose(lowest[rows], online[rows], atol=1e-5)
    assert rows.sum() > 20 and windows.errors is None


def test_onnx_files_read_it_as_torch_does(export_folder, store_folder, tmp_path):
    import onnxruntime

    export = load_export(export_folder)
    data = RolloutData([store_folder], history=6, space=export.space.to_dict(), last_disagreement=True)
    for kind in ("generators", "gates"):
        (tmp_path / kind).mkdir()
    windows = data.judged([export.generator("mlp", data.space)], data.split.calibration)
    export_onnx(export, windows, frames_of(data.split.calibration), tmp_path)  # compares with torch
    inputs = {
        kind: [i.name for i in onnxruntime.InferenceSession(tmp_path / kind / "mlp.onnx").get_inputs()]
        for kind in ("generators", "gates")
    }
    assert "vla_error" in inputs["gates"] and "vla_error" not in inputs["generators"]


def test_every_input_has_a_name():
    features = FeatureConfig(2, 3, (0,), (-1,), (1,), state_lags=(1,))
    plain = input_names(ClassifierConfig(features))
    compared = [f"{name}[{d}]" for name in ("proposal", "proposal-action[t-1]", "proposal-vla_action") for d in range(2)]
    assert plain == [*feature_names(features), *compared]
    config = ClassifierConfig(replace(features, vla_plan=3), eyes=True, last_disagreement=True)
    names = input_names(config)
    assert names[-9:] == [*compared, "proposal-other arm[0]", "proposal-other arm[1]", "arm"]
    assert names[-11:-9] == ["last_disagreement[0]", "last_disagreement[1]"] and names[-12] == "eyes[63]"
    assert len(set(names)) == len(names) == ActionTypeClassifier(config).net.linear[0].in_features


def test_the_option_is_yes_or_no(store_folder, tmp_path):
    with pytest.raises(InputError, match="last_disagreement") as caught:
        distilled(store_folder, tmp_path / "export", {"last_disagreement": "yes"})
    assert caught.value.field == "gate"
    plan = Plan({"data": [store_folder]}, tmp_path, {}, {"last_disagreement": True}, 1, 1, 2, 0.2)
    assert (
        plan.rollouts.last_disagreement
        and not Plan({"data": [store_folder]}, tmp_path, {}, {}, 1, 1, 2, 0.2).rollouts.last_disagreement
    )
