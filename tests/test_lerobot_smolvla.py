"""A flow policy in LeRobot's own environment (make test-lerobot): SmolVLA at a tiny size, with random weights and no hub, from
pixels through lerobot-eval itself."""

from __future__ import annotations

import signal
import sys
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

import tests
from spvla import save_export
from tests.test_lerobot_plugin import STEPS, evaluate, plugin, pusht_export

pytestmark = pytest.mark.lerobot

PIXELS = ["--env.type=pusht", "--env.obs_type=pixels_agent_pos", f"--env.episode_length={STEPS}", "--env.task=PushT-v0"]
PIXELS += ["--env.observation_height=64", "--env.observation_width=64"]
PLAN, EXECUTED = 10, 8


def tiny_vlm(folder: Path) -> Path:
    """A SmolVLM of two small layers with a processor of its own, as the hub would hold it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import (
        PreTrainedTokenizerFast,
        SmolVLMConfig,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    special = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>"}
    words = ["<pad>", "<unk>", "<end_of_utterance>", *special.values(), "push", "the", "block", "onto", "target"]
    tokens = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = WhitespaceSplit()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<end_of_utterance>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, extra_special_tokens=special, **names)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    vision = {**sizes, "num_hidden_layers": 1, "image_size": 64, "patch_size": 16}
    text = {**sizes, "model_type": "llama", "num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 16}
    text |= {"vocab_size": 32, "pad_token_id": 0}
    SmolVLMConfig(vision_config=vision, text_config=text, scale_factor=2, image_token_id=3).save_pretrained(folder)
    SmolVLMProcessor(SmolVLMImageProcessor(), tokenizer, SmolVLMVideoProcessor(), image_seq_len=4).save_pretrained(folder)
    return folder


def smolvla(folder: Path, camera: str) -> tuple[Path, Path]:
    """A small random SmolVLA with its processors, and an export."""
    import torch
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    torch.manual_seed(0)
    config = SmolVLAConfig(
        input_features={
            "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
            camera: PolicyFeature(FeatureType.VISUAL, (3, 64, 64)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (2,))},
        chunk_size=PLAN,
        n_action_steps=EXECUTED,
        num_steps=2,
        num_vlm_layers=2,
        resize_imgs_with_padding=(64, 64),
        vlm_model_name=str(tiny_vlm(folder / "vlm")),
        device="cpu",
        push_to_hub=False,
    )
    stats = {
        "observation.state": {"mean": torch.full((2,), 256.0), "std": torch.full((2,), 120.0)},
        "action": {"mean": torch.full((2,), 250.0), "std": torch.full((2,), 60.0)},
    }
    SmolVLAPolicy(config).save_pretrained(folder / "policy")
    for processor in make_pre_post_processors(config, dataset_stats=stats):
        processor.save_pretrained(folder / "policy")
    return folder / "policy", save_export(pusht_export(), folder / "export")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    return smolvla(tmp_path_factory.mktemp("smolvla"), "observation.image")


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """For how many lanes it planned, each time that it was asked."""
    from lerobot.policies.smolvla.modeling_smolvla import VLAFlowMatching

    counts: list[int] = []
    sample = VLAFlowMatching.sample_actions

    def counted(self, images, *more, **options):
        counts.append(len(images[0]))
        return sample(self, images, *more, **options)

    monkeypatch.setattr(VLAFlowMatching, "sample_actions", counted)
    return counts


def test_off_is_the_base_alone(made, monkeypatch, tmp_path):
    """Its plans begin with noise: the same seed draws the same."""
    policy, _ = made
    _, base = evaluate(monkeypatch, tmp_path / "base", f"--policy.path={policy}", "--policy.device=cpu", batch=2, env=PIXELS)
    monkeypatch.setenv("SPVLA", "off")
    _, off = evaluate(monkeypatch, tmp_path / "off", *plugin(made), batch=2, env=PIXELS)
    np.testing.assert_array_equal(off, base)
    assert np.ptp(base, axis=1).min() > 1e-3, "it moves"


def test_it_is_asked_less_often_and_every_lane_ends(made, asked, monkeypatch, tmp_path):
    info, on = evaluate(monkeypatch, tmp_path / "on", *plugin(made), episodes=4, batch=4, env=PIXELS)
    assert len(info["per_task"][0]["metrics"]["sum_rewards"]) == 4 and np.isfinite(on).all()
    together = sum(asked)
    asked.clear()
    evaluate(monkeypatch, tmp_path / "alone", *plugin(made, "--policy.generator=none"), episodes=4, batch=4, env=PIXELS)
    assert 0 < together < sum(asked) == 4 * -(-STEPS // EXECUTED)


def test_a_robot_is_driven_by_a_made_folder(asked, monkeypatch, tmp_path):
    """lerobot-rollout with a robot of two axes that notes what it is told and ends the rollout after 40 commands."""
    from lerobot.robots import Robot, RobotConfig
    from lerobot.scripts.lerobot_rollout import rollout
    from lerobot_policy_spvla.__main__ import make

    told: list[list[float]] = []

    class PointConfig(RobotConfig):
        pass

    class Point(Robot):
        config_class, name = PointConfig, "point"
        is_connected = is_calibrated = True
        action_features = MappingProxyType({"x.pos": float, "y.pos": float})
        observation_features = MappingProxyType({**action_features, "top": (64, 64, 3)})

        def connect(self, calibrate=True):
            self.cameras, self.at = {}, [256.0, 256.0]

        def get_observation(self):
            return {"x.pos": self.at[0], "y.pos": self.at[1], "top": np.full((64, 64, 3), len(told), np.uint8)}

        def send_action(self, action):
            self.at = [float(action["x.pos"]), float(action["y.pos"])]
            told.append(self.at)
            if len(told) == 40:
                raise KeyboardInterrupt
            return action

        def calibrate(self):
            pass

        configure = disconnect = calibrate

    RobotConfig.register_subclass("point")(PointConfig)
    monkeypatch.setattr(tests, "Point", Point, raising=False)
    policy, export = smolvla(tmp_path, "observation.images.top")
    make(str(policy), str(export), tmp_path / "folder", risk=0.2)
    words = ["--robot.type=point", f"--robot.calibration_dir={tmp_path}", "--task=push the block", "--device=cpu", "--fps=100"]
    words += ["--return_to_initial_position=false", "--play_sounds=false", f"--policy.path={tmp_path / 'folder'}"]
    monkeypatch.setattr(sys, "argv", ["lerobot-rollout", *words])
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)}
    try:
        rollout()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    repeated = sum(a == b for a, b in pairwise(told))
    assert len(told) == 40 and repeated > 0, "the export's generator is the last action"
    assert 0 < len(asked) < 40 / EXECUTED
