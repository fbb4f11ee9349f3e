"""The LeRobot plugin in LeRobot's own environment (make test-lerobot): tiny random policies through lerobot-eval itself."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spvla import ActionSpace, save_export
from spvla.export import Export
from spvla.gates.base import Decisions
from spvla.gates.calibration import calibrate
from spvla.gates.classifier import ActionTypeClassifier, ClassifierConfig
from spvla.generators.features import FeatureConfig

pytestmark = pytest.mark.lerobot

PUSHT = ActionSpace("pusht", "eef_absolute", 10.0, (0.0, 0.0), (512.0, 512.0), (0.0, 0.0), (512.0, 512.0))
STEPS = 30
ENV = ["--env.type=pusht", "--env.obs_type=environment_state_agent_pos", f"--env.episode_length={STEPS}", "--env.task=PushT-v0"]


def pusht_export() -> Export:
    """The last action goes on, under a gate that opens more often than not."""
    import torch

    torch.manual_seed(1)
    g = np.random.default_rng(0)
    features = FeatureConfig(2, 6, (0, 1), (0.0, 0.0), (512.0, 512.0))
    p = [g.random(40) for _ in range(60)]
    gates = {"last": ActionTypeClassifier(ClassifierConfig(features, width=8, depth=1))}
    curve = calibrate(p, [g.random(40) < 0.1 for _ in p])
    defaults = {"generator": "last", "gate": "learned", "risk": 0.2, "max_generated_run": 3}
    return Export(PUSHT, 0.2, {}, gates, {"last": curve}, defaults)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """A small random ACT with its processors, and an export."""
    import torch
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy
    from lerobot.policies.factory import make_pre_post_processors

    torch.manual_seed(0)
    config = ACTConfig(
        input_features={
            "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
            "observation.environment_state": PolicyFeature(FeatureType.ENV, (16,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (2,))},
        chunk_size=6,
        n_action_steps=4,
        dim_model=32,
        n_heads=2,
        dim_feedforward=64,
        n_encoder_layers=1,
        use_vae=False,
        pretrained_backbone_weights=None,
        device="cpu",
        push_to_hub=False,
    )
    stats = {
        "observation.state": {"mean": torch.full((2,), 256.0), "std": torch.full((2,), 120.0)},
        "observation.environment_state": {"mean": torch.full((16,), 200.0), "std": torch.full((16,), 150.0)},
        "action": {"mean": torch.full((2,), 250.0), "std": torch.full((2,), 60.0)},
    }
    folder = tmp_path_factory.mktemp("made")
    ACTPolicy(config).save_pretrained(folder / "act")
    for processor in make_pre_post_processors(config, dataset_stats=stats):
        processor.save_pretrained(folder / "act")
    return folder / "act", save_export(pusht_export(), folder / "export")


def evaluate(
    monkeypatch, output: Path, *options: str, episodes: int = 2, batch: int = 1, env: list[str] = ENV
) -> tuple[dict, np.ndarray]:
    """lerobot-eval: the eval_info.json that it leaves, and what each episode's environment was told, (N, STEPS, 2)."""
    import gymnasium
    from lerobot.scripts.lerobot_eval import main

    told: list[np.ndarray] = []
    step = gymnasium.vector.SyncVectorEnv.step

    def noted(env, actions):
        told.append(np.array(actions))
        return step(env, actions)

    with monkeypatch.context() as patch:
        patch.setattr(gymnasium.vector.SyncVectorEnv, "step", noted)
        words = ["lerobot-eval", *options, *env, f"--eval.n_episodes={episodes}", f"--eval.batch_size={batch}"]
        patch.setattr(sys, "argv", [*words, f"--output_dir={output}", "--seed=3", "--eval.use_async_envs=false"])
        main()
    actions = np.array(told).reshape(-1, STEPS, batch, 2).swapaxes(1, 2).reshape(-1, STEPS, 2)[:episodes]
    return json.loads((output / "eval_info.json").read_text()), actions


class Striped:
    """A gate that opens by where the robot is, so that lanes go different ways."""

    history_length = 1

    def __init__(self, space):
        pass

    def decide(self, window, proposals):
        return Decisions(window.states[:, -1, 0] // 40 % 2 == 0, np.full(len(proposals), "stripes"))


STRIPED = "tests.test_lerobot_plugin:Striped"


def plugin(made, *more: str) -> list[str]:
    act, export = made
    return ["--policy.type=spvla", f"--policy.base={act}", f"--policy.export={export}", "--policy.device=cpu", *more]


def test_ten_episodes_in_a_batch_are_those_one_by_one(made, monkeypatch, tmp_path):
    striped = plugin(made, f"--policy.scheduler={STRIPED}")
    four, in_fours = evaluate(monkeypatch, tmp_path / "four", *striped, episodes=10, batch=4)
    one, alone = evaluate(monkeypatch, tmp_path / "one", *striped, episodes=10, batch=1)
    assert alone.shape == (10, STEPS, 2) and np.abs(alone[1:] - alone[:1]).max((1, 2)).min() > 1e-3, "no two are the same"
    np.testing.assert_allclose(in_fours, alone, rtol=1e-4)
    rewards = [info["per_task"][0]["metrics"]["sum_rewards"] for info in (four, one)]
    np.testing.assert_allclose(*rewards, atol=1e-4)


def shape(value):
    """Keys and kinds of a JSON value; of a list its first entry's, of a map of groups one group's."""
    if isinstance(value, dict):
        return {k: shape(v) for k, v in value.items()}
    return [shape(v) for v in value[:1]] if isinstance(value, list) else None if value is None else type(value).__name__


def test_our_eval_info_has_their_form(made, monkeypatch, tmp_path):
    from eval.lerobot_info import eval_info

    theirs, _ = evaluate(monkeypatch, tmp_path / "theirs", *plugin(made))
    ours = json.loads(json.dumps(eval_info([{"cell": "vla", "task": 0, "success": s} for s in (True, False)])))
    for info in (theirs, ours):
        info["per_group"] = dict(enumerate(info["per_group"].values()))
        info["per_task"] = [{**task, "task_group": "g"} for task in info["per_task"]]
        info["overall"] = dict.fromkeys(info["overall"])
        for part in (*info["per_group"].values(), *(task["metrics"] for task in info["per_task"])):
            part.update(video_paths=[], predicted_video_paths=[])
    assert shape(ours) == shape(theirs)
    assert ours["per_group"][0]["pc_success"] == 50 and ours["per_group"][0]["n_episodes"] == 2


def test_off_is_the_base_alone(made, monkeypatch, tmp_path):
    act, _ = made
    _, base = evaluate(monkeypatch, tmp_path / "base", f"--policy.path={act}", "--policy.device=cpu", batch=2)
    monkeypatch.setenv("SPVLA", "off")
    _, off = evaluate(monkeypatch, tmp_path / "off", *plugin(made), batch=2)
    np.testing.assert_array_equal(off, base)
    monkeypatch.delenv("SPVLA")
    _, on = evaluate(monkeypatch, tmp_path / "on", *plugin(made), batch=2)
    assert np.abs(on - base).max() > 1e-3, "and on it is another policy"


def test_a_made_folder_is_the_policy(made, monkeypatch, tmp_path):
    from lerobot_policy_spvla.__main__ import make

    act, export = made
    make(str(act), str(export), tmp_path / "folder", risk=0.2)
    assert {f.name for f in act.glob("policy_*")} == {f.name for f in (tmp_path / "folder").glob("policy_*")}
    _, by_path = evaluate(monkeypatch, tmp_path / "a", f"--policy.path={tmp_path / 'folder'}", "--policy.device=cpu")
    _, by_type = evaluate(monkeypatch, tmp_path / "b", *plugin(made, "--policy.risk=0.2"))
    np.testing.assert_array_equal(by_path, by_type)


def test_the_environment_does_the_same_without_a_flag(made, tmp_path):
    act, export = made
    program = [sys.executable, "-m", "lerobot.scripts.lerobot_eval", f"--policy.path={act}", "--policy.device=cpu", *ENV]
    program += ["--eval.n_episodes=1", "--eval.batch_size=1", f"--output_dir={tmp_path}", "--eval.use_async_envs=false"]
    settings = {**os.environ, "SPVLA_EXPORT": str(export), "SPVLA_RISK": "0.2"}
    told = subprocess.run(program, env=settings, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert len(json.loads((tmp_path / "eval_info.json").read_text())["per_task"]) == 1
    assert sum("spvla: " in line and "VLA alone" in line for line in (told.stdout + told.stderr).splitlines()) == 1


# ------------------------------------------------------------------------------------------------------- one at a time


def policy_of(made, **options):
    from lerobot_policy_spvla import SpvlaConfig
    from lerobot_policy_spvla.modeling_spvla import SpvlaPolicy

    act, export = made
    return SpvlaPolicy(SpvlaConfig(**{"base": str(act), "export": str(export), "device": "cpu", **options}))


def batches(made, lanes: int, steps: int):
    """Observations as LeRobot's loop hands them to a policy."""
    import torch
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import make_pre_post_processors

    before, _ = make_pre_post_processors(PreTrainedConfig.from_pretrained(made[0]), str(made[0]))
    g = torch.Generator().manual_seed(5)
    seen = 512 * torch.rand((lanes, 18), generator=g)
    for _ in range(steps):
        seen = (seen + 8 * torch.randn((lanes, 18), generator=g)).clamp(0, 512)
        yield before(
            {
                "observation.state": seen[:, :2].clone(),
                "observation.environment_state": seen[:, 2:].clone(),
                "task": [f"push {i}" for i in range(lanes)],
            }
        )


def test_nothing_on_is_the_base_bit_for_bit(made, monkeypatch):
    from lerobot.policies.act.modeling_act import ACTPolicy

    base = ACTPolicy.from_pretrained(made[0])
    monkeypatch.setenv("SPVLA", "off")
    off = policy_of(made)
    monkeypatch.delenv("SPVLA")
    none = policy_of(made, generator="none")
    for policy in (base, off, none):
        policy.reset()
    for batch in batches(made, 3, 14):
        want = base.select_action(dict(batch))
        for policy in (off, none):
            assert policy.select_action(dict(batch)).equal(want)


def test_the_base_is_asked_for_the_lanes_that_need_it_and_the_counts_are_its_own(made):
    policy = policy_of(made, scheduler=STRIPED)
    sizes: list[int] = []
    policy.base.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0]["observation.state"])))
    policy.reset()
    for batch in batches(made, 5, 40):
        assert policy.select_action(batch).shape == (5, 2)
    stats = policy.lanes.stats()
    assert len(sizes) == policy.lanes.ledger.calls and sum(sizes) == sum(s["vla_calls"] for s in stats)
    assert all(0 < s["generated"] < 40 and s["steps"] == 40 for s in stats)
    assert min(sizes) < 5, "some steps ask for some lanes"


def test_a_lane_acts_as_it_would_alone(made):
    together, alone = (policy_of(made, scheduler=STRIPED) for _ in range(2))
    together.reset(), alone.reset()
    for batch in batches(made, 4, 40):
        acted = together.select_action(dict(batch))
        one = {k: v[2:3] if hasattr(v, "__getitem__") and v is not None and len(v) == 4 else v for k, v in batch.items()}
        np.testing.assert_allclose(alone.select_action(one)[0], acted[2], atol=1e-5)
    assert alone.lanes.stats()[0]["generated"] == together.lanes.stats()[2]["generated"] > 0


def test_generated_actions_come_out_in_the_robots_units(made):
    """After the base's postprocessor, the last action goes on unchanged."""
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import make_pre_post_processors

    _, after = make_pre_post_processors(PreTrainedConfig.from_pretrained(made[0]), str(made[0]))
    policy = policy_of(made, risk=1.0)
    policy.reset()
    acted, made_by = [], []
    for batch in batches(made, 1, 20):
        acted.append(after(policy.select_action(batch))[0].numpy())
        made_by.append(policy.lanes.lanes[0].policy.last_step.source.name)
    steps = [t for t, source in enumerate(made_by) if source == "GENERATOR"]
    assert steps
    for t in steps:
        np.testing.assert_allclose(acted[t], acted[t - 1], rtol=1e-5)


@pytest.mark.parametrize("fault", ["export", "base", "no base", "dimensions", "ensembling"])
def test_what_cannot_be_is_one_line_and_code_two(made, fault, tmp_path, caplog):
    options = {}
    if fault == "export":
        options = {"export": str(tmp_path / "nothing")}
    elif fault == "base":
        options = {"base": str(tmp_path / "nothing")}
    elif fault == "no base":
        options = {"base": None}
    elif fault == "ensembling":
        options = {"base_overrides": ["--temporal_ensemble_coeff=0.01", "--n_action_steps=1"]}
    else:
        from tests.test_export import make_export

        options = {"export": str(save_export(make_export(), tmp_path / "seven"))}
    caplog.set_level(logging.INFO, "spvla")
    with pytest.raises(SystemExit) as ended:
        policy_of(made, **options)
    assert ended.value.code == 2
    (line,) = [r.getMessage() for r in caplog.records if r.name == "spvla"]
    assert "\n" not in line


def test_a_wrong_export_in_the_environment_leaves_the_base_alone(made, monkeypatch, caplog):
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot_policy_spvla import SpvlaConfig
    from lerobot_policy_spvla.environment import accelerate_by_environment

    own = PreTrainedConfig.__dict__["from_pretrained"]
    try:
        for name, value, kind in (
            ("SPVLA_EXPORT", "/nothing/here", "act"),
            ("SPVLA_RISK", "much", "act"),
            ("SPVLA_RISK", "0.2", "spvla"),
            ("SPVLA", "off", "act"),
        ):
            PreTrainedConfig.from_pretrained = own
            monkeypatch.setenv("SPVLA_EXPORT", str(made[1]))
            monkeypatch.setenv(name, value)
            accelerate_by_environment()
            config = PreTrainedConfig.from_pretrained(made[0], cli_overrides=["--n_action_steps=2"])
            assert config.type == kind, (name, value)
            if isinstance(config, SpvlaConfig):
                assert config.base_config().n_action_steps == 2 and config.risk == 0.2
                assert PreTrainedConfig.from_pretrained(made[0]).type == "act", "from Python nothing changes"
    finally:
        PreTrainedConfig.from_pretrained = own


def test_a_base_whose_actions_cannot_be_undone_is_refused(made):
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.processor import AbsoluteActionsProcessorStep
    from lerobot_policy_spvla.processor_spvla import Units

    from spvla import InputError

    config = replace(policy_of(made).base.config)
    before, after = make_pre_post_processors(config, str(made[0]))
    after.steps = [*after.steps, AbsoluteActionsProcessorStep()]
    with pytest.raises(InputError) as caught:
        Units((before, after))
    assert caught.value.code == "unsupported-base"
