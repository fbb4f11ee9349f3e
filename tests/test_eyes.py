"""A gate with eyes: what it sees is the same in training and on a robot, and it notices what a blind one cannot."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

import spvla
from data.store import RolloutStore
from data.views import views
from data.windows import Windows
from eval.offline import offline
from spvla.actions import LIBERO
from spvla.errors import InputError
from spvla.export import load_export
from spvla.files import read_json
from spvla.gates.classifier import ActionTypeClassifier, ClassifierConfig, LearnedGate
from spvla.gates.eyes import Eyes, EyesConfig, eyes_config
from spvla.gates.live import LiveGate
from spvla.generators.features import FeatureConfig
from spvla.history import ActionHistory, Source
from spvla.info import print_info
from spvla.observation import WRIST, Observation
from spvla.realtime import BridgePolicy
from spvla.recording import Recorder
from spvla.shadow import ShadowPolicy
from spvla.store import Episode, RolloutWriter, read_episodes
from spvla.vlas.base import VLAOutput
from spvla.vlas.conventions import decode_image, encode_jpeg
from tests.conftest import ScriptedVLA, write_store
from train.calibrate import judge_episode
from train.datamodules import RolloutData
from train.distill import distill

SMALL = {"size": 16, "width": 8}
STEPS = 24


def scene(moved: bool, t: int) -> np.ndarray:
    """A block that lies left or right, and a hand that goes down, uint8 (32, 40, 3)."""
    image = np.full((32, 40, 3), 40, np.uint8)
    image[18:28, 26:36] = 0
    left = 24 if moved else 6
    image[8:18, left : left + 10] = (230, 200, 30)
    image[: 4 + t, 19:22] = 120
    return image


def moving_episode(seed: int) -> Episode:
    """The block jumps at some step; from then on the teacher goes the other way."""
    g = np.random.default_rng(seed)
    when = int(g.integers(6, 18))
    after = np.arange(STEPS) >= when
    actions = np.zeros((STEPS, 7), np.float32)
    actions[:, 0], actions[:, 6] = np.where(after, -0.4, 0.4), -1
    before = np.concatenate([np.zeros((1, 3)), np.cumsum(actions[:-1, :3], axis=0)])
    states = before * 0.01 + g.normal(0, 0.002, (STEPS, 3))
    episode = Episode(
        actions,
        "go",
        np.arange(STEPS) / 20,
        states=states.astype(np.float32),
        sources=np.zeros(STEPS, np.uint8),
        vla_actions=actions.copy(),
        success=True,
        metadata={"dataset": "blocks", "number": seed},
    )
    episode.images = {"front": [encode_jpeg(scene(bool(a), t)) for t, a in enumerate(after)]}
    return episode


def recorded_store(folder, seeds):
    writer = RolloutWriter(folder, LIBERO, policy="scripted")
    for seed in seeds:
        writer.write(f"job-{seed:03d}", [moving_episode(seed)])
    return writer.finalize()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return recorded_store(tmp_path_factory.mktemp("eyes") / "store", range(60))


def distilled(store, folder, gate):
    options = {"width": 32, "depth": 2, "learning_rate": 5e-3, **gate}
    distill(
        [store],
        folder,
        generators=[],
        baselines=["last"],
        gate=options,
        history=6,
        batch_size=256,
        gate_steps=150,
        hide=0.0,
        calibration_fraction=0.3,
        default_risk=0.1,
        threads=1,
    )
    return folder


@pytest.fixture(scope="module")
def export_folder(store, tmp_path_factory):
    return distilled(store, tmp_path_factory.mktemp("eyes") / "export", {"eyes": SMALL})


def area(export, store, output):
    offline(store, export, output, generators=["last"])
    return read_json(output / "summary.json")["rows"][0]["roc_auc"]


def test_a_gate_with_eyes_notices_what_a_blind_one_cannot(store, export_folder, tmp_path):
    held_out = recorded_store(tmp_path / "held_out", range(100, 130))
    assert area(export_folder, held_out, tmp_path / "seeing") > 0.97
    assert area(distilled(store, tmp_path / "blind", {}), held_out, tmp_path / "out") < 0.85


def test_what_is_seen_is_the_camera_image_in_small():
    g, eyes = np.random.default_rng(0), EyesConfig(size=32)
    image = g.integers(0, 256, (64, 96, 3), np.uint8)
    blocks = image.reshape(32, 2, 32, 3, 3).mean((1, 3))
    assert np.abs(eyes.look(Observation(image)).astype(float) - blocks).max() <= 1
    np.testing.assert_array_equal(eyes.view(image), cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA))


@pytest.mark.parametrize("hidden", [0, 1, 3, 5])
def test_training_windows_hold_what_a_robot_would_have_seen(store, hidden):
    eyes = EyesConfig(**SMALL)
    windows = Windows([RolloutStore(store)], 6).seen(eyes)
    recorded = next(read_episodes(store))
    g = np.random.default_rng(hidden)
    for t in range(hidden + 1, STEPS):
        history = ActionHistory(LIBERO, 6)
        for k in range(t):
            frame = eyes.view(decode_image(recorded.images["front"][k]))
            history.observe(recorded.states[k], frame)
            generated = k >= t - hidden
            output = None if generated else VLAOutput(recorded.actions[k][None])
            history.act(recorded.actions[k], Source.GENERATOR if generated else Source.VLA, output)
        history.observe(recorded.states[t], eyes.view(decode_image(recorded.images["front"][t])))
        online = history.window()
        trained = windows.batch(np.array([t, int(g.integers(200))]), np.array([hidden, 0])).window
        np.testing.assert_array_equal(online.frame[0], trained.frame[0])
        np.testing.assert_array_equal(online.vla_frame[0], trained.vla_frame[0])
        np.testing.assert_array_equal(online.vla_age[0], trained.vla_age[0])


def test_calibration_decides_as_the_robot_does(store, export_folder):
    export = load_export(export_folder)
    limits, generator = export.limits("last", LIBERO), export.generator("last", LIBERO)
    data = RolloutData([store], 6, eyes=SMALL, space=export.space.to_dict())
    lowest, _ = judge_episode(data.seen, generator, export.gates["last"], 0, STEPS, export.tolerance, limits)
    recorded = next(read_episodes(store))
    history, gate = ActionHistory(export.acting_space(LIBERO), 6), LearnedGate.from_export(export, "last", 1.0, LIBERO)
    for t, action in enumerate(recorded.actions):
        history.observe(recorded.states[t], export.eyes.view(decode_image(recorded.images["front"][t])))
        decision = gate.decide(window := history.window(), generator.propose(window)[:, 0])[0]
        if t and np.isfinite(lowest[t]):
            assert decision.probability == pytest.approx(lowest[t], abs=1e-5)
        history.act(action, Source.VLA, VLAOutput(action[None]))


def test_stores_without_the_camera_are_refused_by_name(store, tmp_path):
    blind = write_store(tmp_path / "blind", range(4))
    with pytest.raises(InputError, match=r"blind: holds no images.*--images true") as caught:
        distilled(blind, tmp_path / "export", {"eyes": True})
    assert caught.value.code == "missing-feature" and not (tmp_path / "export" / "config.json").exists()
    with pytest.raises(InputError, match=r"no camera 'wrist_image'.*available: front") as caught:
        views(RolloutStore(store), EyesConfig(camera=WRIST))
    assert caught.value.code == "missing-feature"


def policy_of(export_folder, **options):
    vla = ScriptedVLA(np.tile(np.float32([0.4, 0, 0, 0, 0, 0, -1]), (100, 1)))
    return spvla.accelerate(vla, export_folder, risk=0.3, **options), vla


def play(policy, steps=12, images=None):
    """Steps in which the block lies still; how often the camera was read."""
    read = 0

    def observe():
        nonlocal read
        read += 1
        return Observation(scene(False, read) if images is None else images)

    policy.reset("go")
    for t in range(steps):
        policy.select_action(observe, np.full(3, 0.004 * t, np.float32))
    return read


@pytest.mark.parametrize("gate", ["learned", "live"])
def test_the_camera_is_read_once_a_step(export_folder, gate):
    policy, vla = policy_of(export_folder, gate=gate)
    assert play(policy) == 12 > vla.calls, "some steps are skipped"
    assert all("capture" in s.milliseconds for s in policy.steps)
    assert isinstance(policy.gate, LiveGate) == (gate == "live")


def test_without_eyes_the_camera_is_read_where_the_vla_acts():
    policy, vla = policy_of("generator_libero_expert", generator="ridge", gate="release")
    assert policy.history.frame is None
    policy.reset("go")
    read = []
    for t in range(12):
        policy.select_action(lambda: read.append(1) or Observation(None), np.full(9, 0.01 * t, np.float32))
    assert len(read) == vla.calls


@pytest.mark.parametrize("observation", [Observation(None), Observation({WRIST: scene(False, 0)})])
def test_an_observation_without_the_camera_is_refused(export_folder, observation):
    policy, _ = policy_of(export_folder)
    policy.reset("go")
    with pytest.raises(InputError, match="needs camera 'image' at every step") as caught:
        policy.select_action(observation, np.zeros(3, np.float32))
    assert caught.value.code == "missing-camera"


def test_shadow_mode_and_recorder_look_too(export_folder, tmp_path):
    policy, _ = policy_of(export_folder, shadow=True, record=tmp_path / "recorded")
    assert isinstance(policy, Recorder) and isinstance(policy.policy, ShadowPolicy)
    assert play(policy) == 12
    policy.close()
    assert len(next(read_episodes(tmp_path / "recorded"))) == 12


def test_whoever_cannot_look_at_every_step_is_refused(export_folder):
    with pytest.raises(InputError) as caught:
        policy_of(export_folder, mode="bridge")
    assert caught.value.code == "unsupported"
    policy, vla = policy_of(export_folder)
    with pytest.raises(InputError) as caught:
        BridgePolicy(vla, policy.generator, policy.gate)
    assert caught.value.code == "unsupported"
    policy.reset("go")
    with pytest.raises(InputError) as caught:
        policy.prepare(np.zeros(3, np.float32))
    assert caught.value.code == "unsupported"


def test_an_export_says_that_it_has_eyes(export_folder, capsys):
    assert load_export(export_folder).eyes == EyesConfig(**SMALL)
    print_info(str(export_folder))
    assert "eyes          camera image, 16 x 16 pixels, needed at every step" in capsys.readouterr().out
    assert "eyes: they need the camera `image`" in (export_folder / "README.md").read_text()
    assert load_export("generator_libero_expert").eyes is None


def test_the_encoder_is_small_at_every_size():
    largest = Eyes(EyesConfig(size=64, width=64))
    assert sum(p.numel() for p in largest.parameters()) <= 500_000


@pytest.mark.parametrize(
    ("value", "told"),
    [({"size": 128}, "size"), ({"size": 20}, "multiple of 8"), ({"colour": 1}, "'colour' is unknown"), ("yes", "got 'yes'")],
)
def test_eyes_that_cannot_be_are_refused(value, told):
    with pytest.raises(InputError, match=told):
        eyes_config(value)


def test_frames_of_another_size_and_none_are_refused(store):
    features = FeatureConfig(7, 6, (0,), (-1.0,), (1.0,), state_lags=(1,))
    gate = ActionTypeClassifier(ClassifierConfig(features, 8, 1, eyes=EyesConfig(**SMALL))).eval()
    window = Windows([RolloutStore(store)], 6).seen(EyesConfig(size=32)).batch(np.arange(4)).window
    for given, told in ((window, "16 pixels"), (replace(window, frame=None), "no frames")):
        with pytest.raises(InputError, match=told):
            gate.probability(given, torch.zeros(4, 7))


def test_gates_can_be_trained_anew_for_an_export_whose_generators_stay(store_folder, tmp_path):
    small = {"width": 16, "depth": 1}
    options = {"gate": small, "history": 6, "batch_size": 256, "gate_steps": 20, "baselines": [], "threads": 1}
    distill([store_folder], tmp_path / "first", mlp=small, steps=20, **options)
    distill([store_folder], tmp_path / "second", base=str(tmp_path / "first"), **options)
    first, second = (load_export(tmp_path / name) for name in ("first", "second"))
    for a, b in zip(first.generators["mlp"].parameters(), second.generators["mlp"].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert second.calibration["mlp"].episodes == first.calibration["mlp"].episodes
    assert not list((tmp_path / "second" / ".stages").glob("mlp*")), "no generator was trained"
    with pytest.raises(InputError, match="'transformer' is unknown; available: mlp"):
        distill([store_folder], tmp_path / "third", generators=["transformer"], base=str(tmp_path / "first"), **options)
