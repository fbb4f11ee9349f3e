"""Policies written elsewhere: any object with select_action and reset, LeRobot's, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from spvla import InputError, Observation, SPVLAPolicy, accelerate
from spvla.actions import LIBERO, ActionSpace, read_space
from spvla.gates.base import Decisions
from spvla.generators.ridge import LastActionGenerator
from spvla.history import Source
from spvla.vlas.foreign import ForeignVLA, LeRobotVLA, as_vla
from tests.test_export import make_export
from tests.test_policy import Always


class Queueing:
    """The usual shape of a foreign policy: plans 8 actions, hands them out one by one; a plan counts its own steps."""

    def __init__(self):
        self.plans, self.queue = 0, []

    def reset(self):
        self.queue = []

    def select_action(self, observation):
        if not self.queue:
            self.plans += 1
            self.queue = [np.float32([self.plans / 100, k / 100, 0, 0, 0, 0, 1]) for k in range(8)]
        return self.queue.pop(0)


class Planning(Queueing):
    """One that hands out its whole plan."""

    def select_action(self, observation):
        first = super().select_action(observation)
        plan, self.queue = [first, *self.queue], []
        return np.array(plan)


def drive(policy, steps):
    policy.reset("fold the towel")
    return np.array([policy.select_action(Observation(state=np.zeros(3))) for _ in range(steps)])


@pytest.mark.parametrize("made", [Queueing, Planning])
def test_any_object_alone_acts_as_it_did(made):
    own = Queueing()
    want = [own.select_action(None) for _ in range(20)]
    vla = ForeignVLA(made(), LIBERO)
    np.testing.assert_array_equal(drive(SPVLAPolicy(vla), 20), want)
    assert vla.policy.plans == 3


def test_accelerate_takes_it_as_it_is(tmp_path):
    export = make_export()
    own = Queueing()
    policy = accelerate(own, export, generator="none")
    np.testing.assert_array_equal(drive(policy, 8)[:, 1], np.arange(8, dtype=np.float32) / 100)
    assert policy.vla.policy is own and policy.space.max_jump is None
    with pytest.raises(InputError, match="Queueing: its action space is unknown; pass an export"):
        accelerate(Queueing())
    with pytest.raises(InputError, match="int: expected a VLA"):
        accelerate(3, export)


class Counted:
    """A gate that lets the generator make a given number of actions after each chunk."""

    def __init__(self, run):
        self.run, self.asked, self.history_length = run, 0, max(1, run)

    def decide(self, window, proposals):
        self.asked += 1
        generated = window.sources[0, -self.run :].sum() if self.run else 0
        return Decisions(np.array([generated < self.run]), np.array(["counted"]))


@pytest.mark.parametrize("run", [0, 3])
def test_the_scheduler_decides_when_a_chunk_is_used_up_and_only_then(run):
    gate = Counted(run)
    policy = SPVLAPolicy(ForeignVLA(Planning(), LIBERO), LastActionGenerator(LIBERO), gate)
    out = drive(policy, 8 + run + 8 + run)
    made = "".join("VG"[s.source] for s in policy.steps)
    assert made == ("V" * 8 + "G" * run) * 2
    assert gate.asked == 2 * run + 1, "not asked while a chunk lasts, nor before the first"
    np.testing.assert_array_equal(out[8 + run : 16 + run, 0], np.float32([0.02] * 8))
    assert policy.stats()["vla_calls"] == 2 and [s.reason for s in policy.steps[1:8]] == ["chunk"] * 7


def test_a_refused_proposal_after_a_chunk_means_a_new_plan():
    class Wild(LastActionGenerator):
        def propose(self, window):
            return np.full((1, 1, 7), np.nan, np.float32)

    policy = SPVLAPolicy(ForeignVLA(Planning(), LIBERO), Wild(LIBERO), Always())
    out = drive(policy, 16)
    assert policy.steps[8].fallback and policy.steps[8].source == Source.VLA and out[8, 0] == np.float32(0.02)


def test_a_queue_of_its_own_grows_old_unless_it_is_forgotten():
    stale, fresh = (
        SPVLAPolicy(ForeignVLA(Queueing(), LIBERO, forgetful=f), LastActionGenerator(LIBERO), Counted(3)) for f in (False, True)
    )
    assert drive(stale, 5)[4].tolist() == pytest.approx([0.01, 0.01, 0, 0, 0, 0, 1])
    assert drive(fresh, 5)[4].tolist() == pytest.approx([0.02, 0.00, 0, 0, 0, 0, 1])


def test_the_instruction_and_the_input_reach_the_policy():
    torch = pytest.importorskip("torch")

    class Told:
        def reset(self, task):
            self.task = task

        def select_action(self, given):
            assert given == {"obs": 3.0, "task": self.task}
            return torch.zeros(7, requires_grad=True)

    vla = ForeignVLA(Told(), LIBERO, lambda o, task: {"obs": float(o.state.sum()), "task": task})
    vla.reset("stack")
    output = vla.predict(Observation(state=np.ones(3)))
    assert vla.policy.task == "stack" and output.actions.shape == (1, 7) and output.actions.dtype == np.float32
    for bad, message in ((lambda g: "left", "returned str"), (lambda g: np.zeros((1, 2, 7)), r"shape \(1, 2, 7\)")):
        vla.policy.select_action = bad
        with pytest.raises(InputError, match=message):
            vla.predict(Observation(state=np.ones(3)))


def test_action_spaces_as_configurations_write_them(tmp_path):
    assert read_space("libero") is LIBERO and read_space(LIBERO.to_dict()) == LIBERO
    arm = ActionSpace("arm", "joint_position", 10.0, (-1.0,) * 3, (1.0,) * 3, (-1.0,) * 3, (1.0,) * 3)
    import json

    (tmp_path / "config.json").write_text(json.dumps({"format": 1, "action_space": arm.to_dict()}))
    assert read_space(tmp_path / "config.json") == arm
    for bad in ("mars", {"name": "x"}, tmp_path):
        with pytest.raises(InputError, match="action"):
            read_space(bad)


def config(**changes):
    features = {"observation.images.top": SimpleNamespace(shape=(3, 64, 64))}
    return SimpleNamespace(
        **{
            "n_obs_steps": 1,
            "n_action_steps": 8,
            "image_features": features,
            "action_feature": SimpleNamespace(shape=(7,)),
            "robot_state_feature": None,
            "pretrained_path": None,
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_obs_steps": 2}, "needs 2 observations in a row, .* not supported"),
        ({"temporal_ensemble_coeff": 0.01}, "temporal ensembling .* not supported"),
        ({"action_feature": SimpleNamespace(shape=(14,))}, "14 dimensions, but the action space 'libero' has 7"),
        (
            {"image_features": {f"observation.images.{k}": SimpleNamespace(shape=(3, 8, 8)) for k in "abc"}},
            "say which is which",
        ),
        pytest.param({}, "does not say where its processors are; use LeRobotVLA", marks=pytest.mark.lerobot),
    ],
)
def test_lerobot_policies_that_are_not_supported_are_refused(changes, message):
    policy = SimpleNamespace(config=config(**changes), predict_action_chunk=None)
    with pytest.raises(InputError, match=message):
        as_vla(policy, LIBERO)


# ----------------------------------------------------------------------- with LeRobot itself: make test-lerobot


@pytest.fixture(scope="module")
def act(tmp_path_factory):
    """A small random ACT, saved with its processors and loaded again: 8 of 10 planned actions are executed."""
    import torch
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy
    from lerobot.policies.factory import make_pre_post_processors

    torch.manual_seed(0)
    settings = ACTConfig(
        input_features={
            "observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 64, 64)),
            "observation.images.hand": PolicyFeature(FeatureType.VISUAL, (3, 64, 64)),
            "observation.state": PolicyFeature(FeatureType.STATE, (8,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (7,))},
        chunk_size=10,
        n_action_steps=8,
        dim_model=32,
        n_heads=2,
        dim_feedforward=64,
        n_encoder_layers=1,
        use_vae=False,
        pretrained_backbone_weights=None,
        device="cpu",
        push_to_hub=False,
    )
    folder = tmp_path_factory.mktemp("act")
    image = {"mean": torch.full((3, 1, 1), 0.4), "std": torch.full((3, 1, 1), 0.3)}
    stats = {
        "observation.images.top": image,
        "observation.images.hand": image,
        "observation.state": {"mean": torch.full((8,), 0.5), "std": torch.full((8,), 2.0)},
        "action": {"mean": torch.linspace(-0.2, 0.2, 7), "std": torch.full((7,), 0.1)},
    }
    policy = ACTPolicy(settings)
    policy.save_pretrained(folder)
    for processor in make_pre_post_processors(settings, dataset_stats=stats):
        processor.save_pretrained(folder)
    return folder


def look(t):
    g = np.random.default_rng(t)
    images = g.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    return Observation({"image": images[0], "wrist_image": images[1]}, g.normal(size=8).astype(np.float32))


@pytest.mark.lerobot
def test_lerobot_acts_as_in_its_own_loop(act):
    import torch
    from lerobot.policies.act.modeling_act import ACTPolicy
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.utils import prepare_observation_for_inference

    from spvla.vlas.registry import load_vla

    own = ACTPolicy.from_pretrained(act).eval()
    before, after = make_pre_post_processors(own.config, str(act))
    own.reset()
    want = []
    for t in range(20):
        o = look(t)
        frame = {
            "observation.images.top": o.image,
            "observation.images.hand": o.images["wrist_image"],
            "observation.state": o.state,
        }
        with torch.inference_mode():
            batch = before(prepare_observation_for_inference(frame, torch.device("cpu"), "fold"))
            want.append(after(own.select_action(batch))[0].numpy())
    vla = load_vla("lerobot", str(act))
    for policy in (SPVLAPolicy(vla), accelerate(LeRobotVLA(own, LIBERO, (before, after)), make_export(), generator="none")):
        policy.reset("fold")
        got = [policy.select_action(look(t)) for t in range(20)]
        np.testing.assert_allclose(got, want, atol=1e-6)
        assert policy.stats()["vla_calls"] == 3


@pytest.mark.lerobot
def test_lerobot_skips_plans_while_the_generator_goes_on(act):
    from spvla.vlas.registry import load_vla

    policy = SPVLAPolicy(load_vla("lerobot", str(act)), LastActionGenerator(LIBERO), Counted(4))
    policy.reset("fold")
    for t in range(24):
        policy.select_action(look(t))
    assert "".join("VG"[s.source] for s in policy.steps) == ("V" * 8 + "G" * 4) * 2


@pytest.mark.lerobot
def test_lerobot_says_what_does_not_fit(act):
    from spvla.vlas.registry import load_vla

    vla = load_vla("lerobot", str(act))
    assert isinstance(vla, LeRobotVLA)
    vla.reset("fold")
    o = look(0)
    for bad, message in (
        (Observation(o.image, o.state), "the policy needs camera 'wrist_image'"),
        (
            Observation({**o.images, "image": o.image[:32]}, o.state),
            r"observation.images.image: is \(32, 64\); observation.images.top .* \(64, 64\)",
        ),
        (Observation(o.images, o.state[:5]), r"observation.state: the policy needs shape \(8,\), got \(5,\)"),
    ):
        with pytest.raises(InputError, match=message):
            vla.predict(bad)
    with pytest.raises(InputError, match="maps none of"):
        load_vla("lerobot", str(act), {"cameras": {"observation.images.side": "image"}})
    (act.parent / "empty").mkdir()
    for folder, code in (("nothing", "no-such-folder"), ("empty", "not-a-policy")):
        with pytest.raises(InputError) as caught:
            load_vla("lerobot", str(act.parent / folder))
        assert caught.value.code == code
