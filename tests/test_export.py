"""Export folders: round trip, what is refused, and that a robot needs nothing but spvla."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from spvla import InputError, Observation, accelerate, load_export, save_export
from spvla.actions import LIBERO
from spvla.export import Export
from spvla.generators.features import FeatureConfig
from spvla.generators.learned import GeneratorConfig, LearnedGenerator
from spvla.scheduling.calibration import calibrate
from spvla.scheduling.learned import ActionTypeClassifier, ClassifierConfig
from tests.conftest import PrunableVLA, ScriptedVLA


def make_export(dim: int = 7, **changes) -> Export:
    torch.manual_seed(0)
    g = np.random.default_rng(0)
    features = FeatureConfig(dim, 6, (0, 2), (-1, -1), (1, 1))
    p = [g.random(40) for _ in range(60)]
    curve = calibrate(p, [g.random(40) < 0.3 * x for x in p])
    networks = {
        "mlp": LearnedGenerator(GeneratorConfig("mlp", features, (6,), width=16, depth=1)),
        "transformer": LearnedGenerator(GeneratorConfig("transformer", features, (6,), width=16, depth=1, heads=2)),
    }
    gates = {n: ActionTypeClassifier(ClassifierConfig(features, width=8, depth=1)) for n in (*networks, "ridge")}
    defaults = {"generator": "mlp", "scheduler": "learned", "risk": 0.1, "max_generated_run": 8}
    export = Export(LIBERO.with_max_jump(np.full(7, 2)), 0.2, networks, gates, dict.fromkeys(gates, curve), defaults)
    return replace(export, **changes)


@pytest.fixture
def folder(tmp_path):
    return save_export(make_export(), tmp_path / "export")


def drive(policy, steps=40):
    g = np.random.default_rng(3)
    policy.reset("go")
    return np.array([policy.select_action(Observation(state=g.normal(size=3))) for _ in range(steps)])


@pytest.mark.parametrize("generator", ["mlp", "transformer", "ridge"])
@pytest.mark.parametrize("scheduler", ["learned", "release"])
def test_every_cell_survives_the_round_trip(folder, generator, scheduler):
    vla = ScriptedVLA(np.random.default_rng(0).uniform(-1, 1, (50, 7)))
    options = {"generator": generator, "scheduler": scheduler, "risk": 0.3}
    before, after = (drive(accelerate(vla, e, **options)) for e in (make_export(), folder))
    np.testing.assert_array_equal(before, after)


def test_defaults_come_from_the_export_and_the_knob_overrides(folder):
    policy = accelerate(ScriptedVLA(np.zeros((5, 7))), folder)
    with pytest.raises(InputError, match="max_generated_run must be at least 1, got 0"):
        accelerate(ScriptedVLA(np.zeros((5, 7))), folder, max_generated_run=0)
    assert policy.max_generated_run == 8 and policy.space.max_jump == (2.0,) * 7
    curve = load_export(folder).calibration["mlp"]
    assert policy.scheduler.threshold == curve.threshold(0.1)
    assert accelerate(ScriptedVLA(np.zeros((5, 7))), folder, 0.3).scheduler.threshold == curve.threshold(0.3)


def test_an_export_can_ask_for_pruning(tmp_path):
    export = make_export()
    export = replace(export, defaults={**export.defaults, "pruning": {"speed": "constant", "keep": 0.5}})
    folder = save_export(export, tmp_path / "pruned")
    with pytest.raises(InputError, match="ScriptedVLA cannot run on fewer visual tokens"):
        accelerate(ScriptedVLA(np.zeros((5, 7))), folder)
    policy = accelerate(PrunableVLA(np.zeros((5, 7))), folder)
    drive(policy, 3)
    assert policy.steps[0].visual_tokens == (128, 256)
    assert accelerate(ScriptedVLA(np.zeros((5, 7))), folder, pruning="none").pruner is None


def test_nothing_in_the_folder_is_a_pickle(folder):
    assert {p.suffix for p in folder.rglob("*") if p.is_file()} == {".json", ".md", ".safetensors"}


def damage(folder, change):
    if change == "missing config":
        (folder / "config.json").unlink()
    elif change == "missing weights":
        (folder / "gates" / "mlp.safetensors").unlink()
    elif change == "truncated":
        path = folder / "generators" / "mlp.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
    elif change == "not json":
        (folder / "config.json").write_text("{")
    else:
        config = json.loads((folder / "config.json").read_text())
        if change == "missing field":
            del config["tolerance"]
        elif change == "other sizes":
            config["generators"]["mlp"]["width"] = 32
        elif change == "unknown option":
            config["gates"]["mlp"]["colour"] = 1
        elif change == "no calibration":
            del config["calibration"]["ridge"]
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing config", r"config\.json: missing"),
        ("missing weights", r"gates/mlp\.safetensors: missing"),
        ("truncated", r"generators/mlp\.safetensors: not a whole safetensors file"),
        ("not json", r"config\.json: not valid JSON"),
        ("missing field", r"config\.json: field 'tolerance' is missing"),
        ("other sizes", r"mlp\.safetensors: tensor 'net\.0\.bias' has shape \(16,\), config\.json asks for \(32,\)"),
        ("unknown option", r"config\.json: .*colour"),
        ("no calibration", r"calibration lacks gate 'ridge'"),
    ],
)
def test_a_damaged_export_names_its_culprit(folder, change, message):
    damage(folder, change)
    with pytest.raises(InputError, match=message) as caught:
        load_export(folder)
    assert "\n" not in str(caught.value)


def test_ill_fitting_uses_are_refused(folder):
    slow = replace(LIBERO, control_rate=5.0)
    with pytest.raises(InputError, match="control_rate"):
        accelerate(ScriptedVLA(np.zeros((5, 7)), slow), folder)
    vla = ScriptedVLA(np.zeros((5, 7)))
    with pytest.raises(InputError, match="'last' has no gate; gates: mlp, ridge, transformer"):
        accelerate(vla, folder, generator="last")
    with pytest.raises(InputError, match="'magic' is unknown"):
        accelerate(vla, folder, generator="magic")
    with pytest.raises(InputError, match="60 calibration episodes"):
        accelerate(vla, folder, 0.01)
    with pytest.raises(InputError, match="no such folder"):
        load_export(folder / "nowhere")


def test_scales_may_differ_between_robots_of_one_kind(folder):
    """q01/q99 belong to the VLA: normalised weights and thresholds carry over."""
    wide = replace(LIBERO, q01=(-2.0,) * 7, q99=(2.0,) * 7, low=(-2.0,) * 7, high=(2.0,) * 7)
    policy = accelerate(ScriptedVLA(np.full((5, 7), 1.9), wide), folder)
    assert np.abs(drive(policy)).max() <= 2


def test_a_robot_needs_spvla_alone(folder):
    """Training, simulation and their packages are hidden; the export loads and drives."""
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {{"data", "train", "eval", "lightning", "datasets", "libero", "mujoco", "robosuite", "wandb",
                                   "tensorflow_datasets", "matplotlib", "peft"}}:
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import numpy as np, spvla
class V:
    action_space = spvla.LIBERO
    def reset(self, instruction): pass
    def predict(self, observation, keep_mass=1.0): return spvla.VLAOutput(np.zeros((1, 7), np.float32))
policy = spvla.accelerate(V(), {str(folder)!r}, 0.3)
policy.reset("go")
for _ in range(20): policy.select_action(spvla.Observation(state=np.zeros(3)))
assert policy.stats()["steps"] == 20
heavy = {{"transformers", "cv2", "sklearn", "pandas"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)
