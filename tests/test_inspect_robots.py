"""inspect-robots with its own simulated embodiment: any policy behind ``spvla``, and the controller around any policy."""

from __future__ import annotations

import sys
import tomllib
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from spvla import InputError, load_export
from spvla.store import read_episodes

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "integrations" / "inspect_robots_spvla"
pytestmark = pytest.mark.inspect_robots

if str(PLUGIN) not in sys.path:
    sys.path.insert(0, str(PLUGIN))

SMALL = {"max_step": 0.02}  # so that an episode has about 45 steps
KEYS = ["eef_pos", "cube_pos"]


@pytest.fixture
def run(tmp_path):
    """Evaluate a policy on seeded scenes; returns the log and the trials' records."""
    from inspect_robots import eval as evaluate
    from inspect_robots.registry import resolve
    from inspect_robots.scene import Scene
    from inspect_robots.scorer import success_at_end
    from inspect_robots.task import Task

    def start(policy, seeds=range(3), **options):
        scenes = [Scene(f"scene-{k}", "reach the cube", init_seed=k) for k in seeds]
        task = Task(name="reach", scenes=scenes, scorer=success_at_end(), max_steps=200)
        records = []
        embodiment = resolve("embodiment", "cubepick", **SMALL)
        note = lambda record, scene: records.append(record)  # noqa: E731
        (log,) = evaluate(task, policy, embodiment, log_dir=str(tmp_path / "logs"), before_scoring=note, **options)
        return log, records

    return start


class Spiral:
    """Approaches the cube on a spiral, slower when it is near: actions that change from step to step."""

    def __init__(self):
        from inspect_robots.mock import ScriptedPolicy
        from inspect_robots.policy import PolicyConfig, PolicyInfo

        straight = ScriptedPolicy()
        self.info = PolicyInfo("spiral", straight.info.action_space, straight.info.observation_space)
        self.config = PolicyConfig()

    def reset(self, scene):
        pass

    def act(self, observation):
        from inspect_robots.types import Action, ActionChunk

        x, y = observation.state["cube_pos"] - observation.state["eef_pos"]
        return ActionChunk([Action(np.clip(0.05 * np.array([x - 0.7 * y, y + 0.7 * x]), -0.02, 0.02))])


def base(chunk_size=1, name="scripted"):
    from inspect_robots.registry import register, registered, resolve

    if "spiral" not in registered("policy"):
        register("policy", "spiral")(Spiral)
    return resolve("policy", name, **options_of(name, chunk_size))


def options_of(name, chunk_size):
    return {} if name == "spiral" else {"chunk_size": chunk_size, **SMALL}


def accelerated(chunk_size=1, name="scripted", **options):
    from inspect_robots_spvla import SpvlaPolicy

    base(name=name)
    return SpvlaPolicy(name, options_of(name, chunk_size), state_keys=KEYS, **options)


def actions(record):
    return np.array([step.action.data for step in record.steps])


def test_the_entry_point_is_the_policy():
    from inspect_robots.policy import Policy

    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["inspect_robots.policies"]["spvla"].partition(":")
    made = getattr(import_module(module), name)("scripted")
    assert isinstance(made, Policy) and made.info.name == "spvla(scripted)"


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_with_everything_off_the_actions_are_the_bases(run, chunk_size):
    _, alone = run(base(chunk_size))
    policy = accelerated(chunk_size, generator="none")
    log, behind = run(policy)
    assert log.results.metrics == {"success_at_end": 1.0}
    for a, b in zip(alone, behind, strict=True):
        np.testing.assert_allclose(actions(a), actions(b), atol=1e-6)  # they pass through float32
        assert b.metadata["spvla"]["vla_calls"] == -(-len(b.steps) // chunk_size) and b.metadata["spvla"]["generated"] == 0


def test_the_base_is_asked_only_where_the_log_says_so(run):
    policy = accelerated(generator="last", gate="paper", rule={"v_min": 0.0})
    _, records = run(policy)
    for record in records:
        asked = [step.action.meta["called_base"] for step in record.steps]
        assert sum(asked) == record.metadata["spvla"]["vla_calls"] < len(asked)
        assert [s.action.meta["source"] == "generator" for s in record.steps] == [not a for a in asked]
    assert policy.base.num_inferences == records[-1].metadata["spvla"]["vla_calls"], "the base was asked no other time"
    assert policy.transcript()["spvla"] == records[-1].metadata["spvla"]


@pytest.mark.slow
def test_recorded_distilled_and_accelerated_by_policy_and_by_controller(run, tmp_path):
    from inspect_robots_spvla import SpvlaController

    from train.distill import distill

    recorder = accelerated(name="spiral", generator="none", record=str(tmp_path / "rollouts"))
    run(recorder, seeds=range(80))
    recorder.close()
    episodes = list(read_episodes(tmp_path / "rollouts"))
    assert len(episodes) == 80 and all(e.success for e in episodes) and episodes[0].states.shape[1] == 4
    networks = {"mlp": {"width": 64, "depth": 2}, "gate": {"width": 32, "depth": 2}}
    training = {"steps": 300, "gate_steps": 200, "default_risk": 0.2, "threads": 1, "baselines": []}
    distill([tmp_path / "rollouts"], tmp_path / "export", **networks, **training)
    export = str(tmp_path / "export")

    unseen = range(100, 110)
    policy = accelerated(name="spiral", export=export)
    log, records = run(policy, seeds=unseen)
    assert log.results.metrics == {"success_at_end": 1.0}
    asked = sum(r.metadata["spvla"]["vla_calls"] for r in records)
    assert asked < sum(len(r.steps) for r in records) / 2

    controller = SpvlaController(export, state_keys=KEYS)
    log, by_controller = run(base(name="spiral"), seeds=unseen, controller=controller)
    assert log.results.metrics == {"success_at_end": 1.0}
    for a, b in zip(records, by_controller, strict=True):
        np.testing.assert_array_equal(actions(a), actions(b))
    assert sum(len(r.inference_latencies) for r in by_controller) == asked
    assert load_export(export).space.name == "spiral"


def test_what_cannot_be_is_named(run):
    from inspect_robots.types import Observation
    from inspect_robots_spvla import SpvlaController, SpvlaPolicy

    with pytest.raises(InputError, match="'spvla' cannot be its own base"):
        SpvlaPolicy("spvla")
    seen = Observation(state={"eef_pos": np.zeros(2)}, instruction="go")
    with pytest.raises(InputError, match="scripted: its action space has no semantics or no bounds; give space") as caught:
        SpvlaController(generator="last", gate="paper").next_action(base(), seen, 0, {})
    assert caught.value.code == "needs-space"
    log, _ = run(accelerated(export="generator_nano"))
    assert log.status == "error" and log.results.errored_trials == 3
